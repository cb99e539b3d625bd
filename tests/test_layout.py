"""Layout: lists worked by hand, a slow and plain reference, laws of the mixed inputs over real (tiny, random) decoders."""

import random
import time

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from refrag.errors import InputError
from refrag.layout import IGNORED, PADDING, ExpandMask, Layout, lay_out, mix, num_slots
from refrag.text import Chunk, Passage, Prompt

VOCABULARY, HIDDEN = 97, 32
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 512}
GROUPED = SHAPE | {"num_key_value_heads": 2}
DECODERS = {
    "Llama": GROUPED,
    "Qwen2": GROUPED,
    "Qwen3": GROUPED | {"head_dim": 16},  # wider than hidden_size / num_attention_heads
    "Mistral": GROUPED | {"head_dim": 16},
    "Gemma": GROUPED | {"head_dim": 8, "num_key_value_heads": 1},
    "GPTNeoX": SHAPE,
}


def make_decoder(name: str) -> nn.Module:
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{name}Config")(**DECODERS[name], **ends)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request) -> nn.Module:
    return make_decoder(request.param)


def prompt(*pieces: tuple[int, ...] | list[int], overhead: int = 0) -> Prompt:
    """A prompt written down directly: a tuple is a run of plain tokens, a list a chunk."""
    made, chunks = [], []
    for piece in pieces:
        if isinstance(piece, list):
            chunks.append(Chunk(len(chunks), 0, 0, 1, tuple(piece)))
            made.append(chunks[-1])
        else:
            made.append(piece)
    return Prompt(tuple(made), tuple(chunks), (Passage("1", "x"),), overhead)


LONG = prompt((10, 11), [20, 21, 22], (12,), [30, 31], (13,), overhead=1)  # one token of (12,) is a separator
SHORT = prompt((14,), [40])


def random_prompt(rng: random.Random, *, num_chunks: int = 4) -> Prompt:
    def run(longest: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, longest))]

    pieces = [piece for _ in range(num_chunks) for piece in (tuple(run(3)), run(5))]
    return prompt((1, *run(2)), *pieces, tuple(run(4)), overhead=rng.randint(0, 3))


def random_mask(rng: random.Random, row: Prompt) -> list[bool]:
    return [rng.random() < 0.5 for _ in row.chunks]


# --- worked by hand -------------------------------------------------------------------------------------------------


def test_nothing_expanded():
    layout = lay_out([LONG], [[False, False]])
    assert layout.token_ids.tolist() == [10, 11, 12, 13]
    assert layout.source.tolist() == [[0, 1, 4, 2, 5, 3]]
    assert layout.num_chunks == 2
    assert layout.labels.tolist() == [[IGNORED] * 6]
    assert not layout.has_labels
    assert (layout.context_tokens, layout.context_slots) == ((6,), (3,))
    assert layout.compression_rate == [2.0]


def test_one_chunk_expanded():
    layout = lay_out([LONG], [[True, False]])
    assert layout.token_ids.tolist() == [10, 11, 20, 21, 22, 12, 13]
    assert layout.source.tolist() == [[0, 1, 2, 3, 4, 5, 8, 6]]
    assert (layout.context_tokens, layout.context_slots) == ((6,), (5,))


def test_everything_expanded():
    layout = lay_out([LONG], [[True, True]])
    assert layout.token_ids.tolist() == LONG.token_ids() == [10, 11, 20, 21, 22, 12, 30, 31, 13]
    assert layout.source.tolist() == [list(range(9))]
    assert layout.num_chunks == 2
    assert layout.compression_rate == [1.0]


LEFT = {
    "source": [[0, 1, 7, 2, 3, 4, 5], [PADDING, PADDING, PADDING, PADDING, PADDING, 6, 9]],
    "attention_mask": [[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]],
    "position_ids": [[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0, 1]],
}
RIGHT = {
    "source": [[0, 1, 7, 2, 3, 4, 5], [6, 9, PADDING, PADDING, PADDING, PADDING, PADDING]],
    "attention_mask": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0]],
    "position_ids": [[0, 1, 2, 3, 4, 5, 6], [0, 1, 1, 1, 1, 1, 1]],
}


@pytest.mark.parametrize(("side", "expected"), [("left", LEFT), ("right", RIGHT)])
def test_padded_batch(side, expected):
    layout = lay_out([LONG, SHORT], [[False, True], [False]], padding_side=side)
    assert layout.token_ids.tolist() == [10, 11, 12, 30, 31, 13, 14]
    assert layout.num_chunks == 3
    assert {name: getattr(layout, name).tolist() for name in expected} == expected
    assert layout.num_slots == (7, 2)
    assert (layout.context_tokens, layout.context_slots) == ((6, 1), (4, 1))
    assert layout.compression_rate == [1.5, 1.0]


def test_completions_are_the_targets():
    layout = lay_out([LONG, SHORT], [[False, False], [True]], completions=[[50], [60, 61, 62]])
    assert layout.token_ids.tolist() == [10, 11, 12, 13, 50, 14, 40, 60, 61, 62]
    assert layout.source.tolist() == [[0, 1, 10, 2, 11, 3, 4], [PADDING, PADDING, 5, 6, 7, 8, 9]]
    assert layout.labels.tolist() == [[IGNORED] * 6 + [50], [IGNORED] * 4 + [60, 61, 62]]
    assert layout.has_labels
    assert layout.context_tokens == (6, 1), "a completion is not context"


def test_labels_of_the_completions():
    layout = lay_out([SHORT, LONG], [[False], [True, True]], completions=[[60, 61], []], labels=[[IGNORED, 61], []], padding_side="right")
    assert layout.labels.tolist() == [[IGNORED, IGNORED, IGNORED, 61, *[IGNORED] * 5], [IGNORED] * 9]
    assert layout.has_labels
    assert not lay_out([SHORT], [[False]], completions=[[60]], labels=[[IGNORED]]).has_labels


def test_prompt_without_context():
    layout = lay_out([prompt((7, 8))], [[]])
    assert layout.source.tolist() == [[0, 1]]
    assert (layout.context_tokens, layout.context_slots, layout.compression_rate) == ((0,), (0,), [1.0])


def test_prompt_of_one_chunk_alone():
    layout = lay_out([prompt([5, 6])], [[False]], completions=[[5, 6]])
    assert layout.source.tolist() == [[2, 0, 1]]
    assert layout.labels.tolist() == [[IGNORED, 5, 6]]
    assert layout.compression_rate == [2.0]


def test_chunks_between_turns_and_after_the_question():
    """Compress anywhere: a chunk first, two side by side, one last."""
    anywhere = prompt([2, 3], (4,), [5], [6, 7, 8], (9,), [10, 11])
    layout = lay_out([anywhere], [[False, True, False, False]])
    assert layout.token_ids.tolist() == [4, 5, 9]
    assert layout.source.tolist() == [[3, 0, 1, 5, 2, 6]]


@pytest.mark.parametrize("mask", [[True, False], (True, False), np.array([True, False]), torch.tensor([True, False])])
def test_kinds_of_expand_mask(mask):
    assert lay_out([LONG], [mask]).source.tolist() == [[0, 1, 2, 3, 4, 5, 8, 6]]
    assert num_slots(LONG, mask) == 8


def test_num_slots_without_tensors():
    assert [num_slots(LONG, mask) for mask in ([False, False], [True, False], [False, True], [True, True])] == [6, 8, 7, 9]
    assert num_slots(prompt((7, 8)), []) == 2


def test_mixed_inputs_hold_the_right_vectors():
    tokens = nn.Embedding(VOCABULARY, 2)
    with torch.no_grad():
        tokens.weight.copy_(torch.arange(VOCABULARY).float()[:, None].expand(-1, 2))
    layout = lay_out([LONG, SHORT], [[False, True], [False]])
    mixed = mix(layout, tokens, torch.tensor([[-1.0, -1.0], [-2.0, -2.0], [-3.0, -3.0]]))
    assert mixed.inputs_embeds[:, :, 0].tolist() == [[10, 11, -1, 12, 30, 31, 13], [0, 0, 0, 0, 0, 14, -3]]
    assert mixed.attention_mask.tolist() == LEFT["attention_mask"]
    assert mixed.position_ids.tolist() == LEFT["position_ids"]
    assert mixed.labels.tolist() == layout.labels.tolist()


# --- a slow and plain reference -------------------------------------------------------------------------------------


def plainly(prompts: list[Prompt], masks: list[list[bool]], completions: list[list[int]], side: str) -> list[list[object]]:
    """What each slot holds, one piece at a time: a token id, `(row, chunk)`, or None."""
    rows = []
    for number, (row, mask, completion) in enumerate(zip(prompts, masks, completions, strict=True)):
        slots: list[object] = []
        for piece in row.pieces:
            if not isinstance(piece, Chunk):
                slots += piece
            elif mask[piece.index]:
                slots += piece.token_ids
            else:
                slots.append((number, piece.index))
        rows.append([*slots, *completion])
    width = max(map(len, rows))
    return [[None] * (width - len(row)) + row if side == "left" else row + [None] * (width - len(row)) for row in rows]


def read(layout: Layout, prompts: list[Prompt]) -> list[list[object]]:
    chunks = [(number, chunk.index) for number, row in enumerate(prompts) for chunk in row.chunks]
    table = [*layout.token_ids.tolist(), *chunks, None]
    return [[table[place] for place in row] for row in layout.source.tolist()]


@pytest.mark.parametrize("seed", range(40))
def test_layout_equals_the_reference(seed):
    rng = random.Random(seed)
    prompts = [random_prompt(rng, num_chunks=rng.randint(0, 6)) for _ in range(rng.randint(1, 5))]
    masks = [random_mask(rng, row) for row in prompts]
    completions = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(0, 4))] for _ in prompts]
    side = rng.choice(["left", "right"])
    layout = lay_out(prompts, masks, completions=completions, padding_side=side)
    assert read(layout, prompts) == plainly(prompts, masks, completions, side)
    assert list(layout.num_slots) == layout.attention_mask.sum(dim=1).tolist()
    assert sorted(set(layout.source.flatten().tolist()) & set(range(len(layout.token_ids)))) == list(range(len(layout.token_ids)))
    for row, mask, completion, slots, tokens in zip(prompts, masks, completions, layout.num_slots, layout.context_slots, strict=True):
        assert slots == num_slots(row, mask) + len(completion)
        assert tokens == row.num_context_overhead + sum(len(chunk.token_ids) if mask[chunk.index] else 1 for chunk in row.chunks)
    assert layout.context_tokens == tuple(row.num_context_tokens for row in prompts)


# --- laws over decoders ---------------------------------------------------------------------------------------------


def vectors(prompts: list[Prompt], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(len(row.chunks) for row in prompts), HIDDEN, generator=generator)


def run(decoder: nn.Module, layout: Layout, projected_embeds: Tensor) -> Tensor:
    mixed = mix(layout, decoder.get_input_embeddings(), projected_embeds)
    with torch.no_grad():
        return decoder(inputs_embeds=mixed.inputs_embeds, attention_mask=mixed.attention_mask, position_ids=mixed.position_ids).logits


def test_everything_expanded_is_the_plain_decoder_bit_for_bit(decoder):
    rows = [random_prompt(random.Random(seed)) for seed in range(3)]
    for row in rows:
        layout = lay_out([row], [[True] * len(row.chunks)])
        with torch.no_grad():
            plain = decoder(input_ids=torch.tensor([row.token_ids()])).logits
        assert torch.equal(run(decoder, layout, vectors([row])), plain)


def test_nothing_expanded_is_one_slot_a_chunk():
    row = random_prompt(random.Random(5), num_chunks=7)
    layout = lay_out([row], [[False] * 7])
    assert layout.num_slots == (len(row.token_ids()) - sum(len(chunk.token_ids) for chunk in row.chunks) + 7,)
    assert layout.source[layout.source >= len(layout.token_ids)].tolist() == [len(layout.token_ids) + number for number in range(7)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_its_rows_alone(decoder, side):
    rng = random.Random(1)
    rows = [random_prompt(rng, num_chunks=count) for count in (5, 2, 0)]
    masks = [random_mask(rng, row) for row in rows]
    together = lay_out(rows, masks, padding_side=side)
    embeds = vectors(rows)
    batch = run(decoder, together, embeds)
    for number, (row, mask, own) in enumerate(zip(rows, masks, embeds.split([len(row.chunks) for row in rows]), strict=True)):
        alone = run(decoder, lay_out([row], [mask]), own)[0]
        torch.testing.assert_close(batch[number][together.attention_mask[number].bool()], alone, atol=1e-5, rtol=0)


def test_cached_decoding_equals_uncached(decoder):
    rng = random.Random(2)
    rows = [random_prompt(rng, num_chunks=count) for count in (4, 1)]
    masks, endings = [random_mask(rng, row) for row in rows], [[5, 6, 7], [8, 9, 10]]
    uncached = run(decoder, lay_out(rows, masks, completions=endings), vectors(rows))[:, -4:]
    layout = lay_out(rows, masks)
    mixed = mix(layout, decoder.get_input_embeddings(), vectors(rows))
    cache, mask, positions = DynamicCache(config=decoder.config), mixed.attention_mask, torch.tensor(layout.num_slots)[:, None]
    with torch.no_grad():
        steps = [decoder(inputs_embeds=mixed.inputs_embeds, attention_mask=mask, position_ids=mixed.position_ids, past_key_values=cache).logits[:, -1:]]
        for step, token_ids in enumerate(torch.tensor(endings).T[:, :, None]):
            mask = torch.cat([mask, torch.ones_like(positions)], dim=1)
            steps.append(decoder(input_ids=token_ids, attention_mask=mask, position_ids=positions + step, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), uncached, atol=1e-5, rtol=0)


def test_permuted_blocks_are_permuted_slots():
    first, second = ((10,), [20, 21], [22]), ((11, 12), [30, 31, 32])
    one = prompt((1,), *first, *second, (2,))
    other = prompt((1,), *second, *first, (2,))
    front, back = read(lay_out([one], [[True, False, False]]), [one])[0], read(lay_out([other], [[False, True, False]]), [other])[0]
    assert front == [1, 10, 20, 21, (0, 1), 11, 12, (0, 2), 2]
    assert back == [1, 11, 12, (0, 0), 10, 20, 21, (0, 2), 2]


def test_gradients_reach_exactly_the_rows_that_occupy_a_slot(decoder):
    """Through `inputs_embeds` alone: a tied output matrix would give every token a gradient."""
    rows = [LONG, SHORT]
    layout = lay_out(rows, [[False, True], [False]], completions=[[50], [60]])
    embeds = vectors(rows).requires_grad_()
    embedding = decoder.get_input_embeddings()
    mixed = mix(layout, embedding, embeds)
    inputs = mixed.inputs_embeds.detach().requires_grad_()
    logits = decoder(inputs_embeds=inputs, attention_mask=mixed.attention_mask, position_ids=mixed.position_ids).logits
    logits[layout.attention_mask.bool()].square().sum().backward()
    assert not inputs.grad[layout.source == PADDING].any(), "nothing looks at padding"
    token_grad, chunk_grad = torch.autograd.grad(mixed.inputs_embeds, [embedding.weight, embeds], inputs.grad)
    assert token_grad.abs().sum(dim=1).nonzero().flatten().tolist() == sorted([10, 11, 12, 30, 31, 13, 14, 50, 60])
    assert chunk_grad.abs().sum(dim=1).nonzero().flatten().tolist() == [0, 2], "chunk 1 is expanded: its vector is not used"


def test_gradient_of_a_token_that_stands_twice_is_the_sum():
    twice, embedding = prompt((5, 5), [6]), nn.Embedding(VOCABULARY, 3)
    mix(lay_out([twice], [[False]]), embedding, torch.zeros(1, 3)).inputs_embeds.sum().backward()
    assert embedding.weight.grad.sum(dim=1).nonzero().tolist() == [[5]]
    assert embedding.weight.grad[5].tolist() == [2.0, 2.0, 2.0]


def test_token_vectors_come_from_the_embedding_module():
    class Scaled(nn.Embedding):
        def forward(self, token_ids: Tensor) -> Tensor:
            return super().forward(token_ids) * 8

    embedding = Scaled(VOCABULARY, 3)
    inputs = mix(lay_out([SHORT], [[False]]), embedding, torch.zeros(1, 3)).inputs_embeds
    assert torch.equal(inputs[0, 0], embedding.weight[14] * 8)


def test_mixed_inputs_have_the_dtype_of_the_token_embeddings():
    embedding = nn.Embedding(VOCABULARY, 3, dtype=torch.bfloat16)
    assert mix(lay_out([SHORT], [[False]]), embedding, torch.ones(1, 3)).inputs_embeds.dtype == torch.bfloat16


# --- counts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_bytes_are_those_of_the_real_cache(decoder, dtype):
    layout = lay_out([LONG], [[False, True]])
    cache = DynamicCache(config=decoder.config)
    mixed = mix(layout, decoder.get_input_embeddings(), vectors([LONG]))
    with torch.no_grad():
        decoder(inputs_embeds=mixed.inputs_embeds, past_key_values=cache, use_cache=True)
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * dtype.itemsize
    assert layout.kv_bytes(decoder.config, dtype) == [held]


def test_kv_bytes_by_hand():
    llama = transformers.LlamaConfig(num_hidden_layers=16, hidden_size=2048, num_attention_heads=32, num_key_value_heads=8)
    layout = lay_out([LONG, SHORT], [[False, False], [False]])
    assert layout.kv_bytes(llama, torch.bfloat16) == [6 * 32_768, 2 * 32_768]  # 2 · 16 layers · 8 heads · 64 wide · 2 bytes


def test_layout_moves_between_devices():
    moved = lay_out([LONG], [[True, False]]).to("meta")
    assert {tensor.device.type for tensor in (moved.source, moved.token_ids, moved.labels, moved.position_ids)} == {"meta"}
    assert moved.context_tokens == (6,)


def test_four_thousand_tokens_are_laid_out_at_once():
    """The road to the first token: about 0.3 ms of CPU. Twenty times that would be a loop over tokens."""
    rng = random.Random(0)
    pieces = [piece for _ in range(256) for piece in ((3, 4), [rng.randrange(3, 97) for _ in range(16)])]
    mask: ExpandMask = np.array([rng.random() < 0.1 for _ in range(256)])

    def seconds() -> float:
        row = prompt((1,), *pieces)
        start = time.process_time()
        lay_out([row], [mask])
        return time.process_time() - start

    assert min(seconds() for _ in range(10)) < 0.006


# --- users' input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [[True], [True] * 3, [[True, False]]])
def test_mask_must_fit_the_chunks(mask):
    with pytest.raises(InputError, match=r"An expand mask must have one entry a chunk \(2\), had shape \("):
        lay_out([LONG], [np.array(mask)])
    with pytest.raises(InputError, match="one entry a chunk"):
        num_slots(LONG, np.array(mask))


@pytest.mark.parametrize(("name", "values"), [("expand_masks", []), ("completions", [[1], [2]]), ("labels", [])])
def test_one_entry_a_prompt(name, values):
    given = {"expand_masks": [[False]]} | {name: values}
    with pytest.raises(InputError, match=rf"{name} must have one entry a prompt \(1\), had {len(values)}"):
        lay_out([SHORT], **given)


def test_labels_must_fit_the_completions():
    with pytest.raises(InputError, match="Row 1 has a completion of 2 tokens, but 1 labels: give one label a token"):
        lay_out([SHORT, SHORT], [[False], [False]], completions=[[], [1, 2]], labels=[[], [1]])


def test_vectors_must_fit_the_chunks():
    with pytest.raises(InputError, match="The layout has 2 chunks, but 1 vectors were given: pass one vector a chunk, expanded ones too"):
        mix(lay_out([LONG], [[True, True]]), nn.Embedding(VOCABULARY, 3), torch.zeros(1, 3))


def test_a_layout_needs_a_prompt():
    with pytest.raises(InputError, match="needs at least one prompt"):
        lay_out([], [])
