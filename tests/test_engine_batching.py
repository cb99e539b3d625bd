"""Rows that share forwards give what each gives alone by transformers' `generate`, whoever joins, leaves or fails beside them."""

import asyncio
import random
from contextlib import aclosing
from types import SimpleNamespace

import pytest
import torch
from conftest import DECODERS, build_decoder

from refrag.config import GenerationSettings
from refrag.engine.backend import Backend
from refrag.engine.batching import InProcessBackend, Row, RowBatch
from refrag.engine.decoding import TextFeed, end_token_ids, processors
from refrag.errors import BackendError

EOS = 2


def alone(decoder, prompt: torch.Tensor, settings: GenerationSettings) -> list[int]:
    """The oracle: one call of `generate` for one prompt."""
    embeds, mask = prompt[None], torch.ones(1, len(prompt), dtype=torch.long)
    chain = processors(settings, [settings.seed])
    options = {"max_new_tokens": settings.max_new_tokens, "do_sample": False, "eos_token_id": EOS, "pad_token_id": 0}
    return decoder.generate(inputs_embeds=embeds, attention_mask=mask, logits_processor=chain, **options)[0].tolist()


def prompts_of(decoder, count: int, *, seed: int = 0, longest: int = 40) -> list[torch.Tensor]:
    """Prompts of random tokens and, among them, vectors that are no token's."""
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for _ in range(count):
        length = int(torch.randint(1, longest, (1,), generator=generator))
        embeds = decoder.get_input_embeddings()(torch.randint(3, 400, (length,), generator=generator)).detach()
        embeds[::3] = embeds.std() * torch.randn(embeds[::3].shape, generator=generator)
        prompts.append(embeds)
    return prompts


def settings_of(seed: int) -> GenerationSettings:
    """Every kind of decoding in turn."""
    kinds = [{}, {"temperature": 0.8}, {"repetition_penalty": 1.3}, {"temperature": 1.5, "top_k": 20}, {"temperature": 1.0, "top_p": 0.7}]
    return GenerationSettings(max_new_tokens=1 + (seed * 7) % 15, seed=seed, **kinds[seed % len(kinds)])


def play(batch: RowBatch, rows: list[Row], rng: random.Random) -> None:
    """Joins and steps in random order until all have joined and left; at most six rows at a time."""
    waiting = list(rows)
    while waiting or batch.rows:
        room = 6 - len(batch.rows)
        if waiting and room and (not batch.rows or rng.random() < 0.4):
            count = rng.randint(1, min(room, len(waiting)))
            batch.join(batch.prefill(waiting[:count]))
            del waiting[:count]
        else:
            batch.step()


@pytest.mark.parametrize("kind", [*DECODERS, "mistral-window", "gpt2"])
def test_rows_equal_generate_alone_whoever_joins_and_leaves(kind: str) -> None:
    window = {"sliding_window": 8} if kind == "mistral-window" else {}
    decoder = build_decoder("gpt_neox") if kind == "gpt2" else build_decoder(kind.removesuffix("-window"), **window)
    if kind == "gpt2":
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        decoder = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=128)).eval()
    prompts = prompts_of(decoder, 14)
    rows = [Row(prompt, settings_of(seed)) for seed, prompt in enumerate(prompts)]
    batch = RowBatch(decoder, frozenset([EOS]))
    assert batch.can_share
    play(batch, rows, random.Random(kind))
    assert [row.token_ids for row in rows] == [alone(decoder, prompt, settings_of(seed)) for seed, prompt in enumerate(prompts)]
    assert batch.rows == [] and batch._cache is None


def test_the_rows_differ_and_some_end_early() -> None:
    """What the test above rests on: its rows are different, of different lengths, and not all cut off by max_new_tokens."""
    decoder = build_decoder("llama")
    decoder.lm_head.weight.data[EOS] *= 3  # a random model hardly ever ends by itself
    prompts = prompts_of(decoder, 40)
    settings = [settings_of(seed) for seed in range(40)]
    expected = [alone(decoder, prompt, own) for prompt, own in zip(prompts, settings, strict=True)]
    assert 5 < sum(ids[-1] == EOS for ids in expected) < 35
    assert len({tuple(ids) for ids in expected}) > 20
    rows = [Row(prompt, own) for prompt, own in zip(prompts, settings, strict=True)]
    play(RowBatch(decoder, frozenset([EOS])), rows, random.Random(1))
    assert [row.token_ids for row in rows] == expected


def test_cancelled_rows_leave_and_disturb_nobody() -> None:
    decoder = build_decoder("llama")
    prompts = prompts_of(decoder, 6)
    settings = GenerationSettings(max_new_tokens=10)
    rows = [Row(prompt, settings) for prompt in prompts]
    batch = RowBatch(decoder, frozenset([EOS]))
    batch.join(batch.prefill(rows))
    batch.step()
    rows[0].cancelled = rows[3].cancelled = True
    assert batch.step() == [rows[1], rows[2], rows[4], rows[5]]
    rows[5].cancelled = True
    late = Row(prompts[0], settings)
    batch.join(batch.prefill([late]))
    while batch.rows:
        batch.step()
    assert [len(row.token_ids) for row in (rows[0], rows[3], rows[5])] == [2, 2, 3]
    for row, prompt in [(rows[1], prompts[1]), (rows[2], prompts[2]), (rows[4], prompts[4]), (late, prompts[0])]:
        assert row.token_ids == alone(decoder, prompt, settings)


def test_columns_that_only_the_departed_needed_are_freed() -> None:
    decoder = build_decoder("llama")
    long, short = prompts_of(decoder, 1, longest=200)[0].repeat(3, 1), prompts_of(decoder, 1)[0][:2]
    rows = [Row(long, GenerationSettings(max_new_tokens=2)), Row(short, GenerationSettings(max_new_tokens=6))]
    batch = RowBatch(decoder, frozenset([EOS]))
    batch.join(batch.prefill(rows))
    assert batch._cache.layers[0].keys.shape[2] == len(long)
    batch.step()
    assert batch.rows == [rows[1]]
    assert batch._cache.layers[0].keys.shape[2] == batch._mask.shape[1] == 2 + 1


@pytest.mark.parametrize(
    ("overrides", "shared"),
    [({}, True), ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, False), ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, True)],
)
def test_decoders_whose_rows_would_disturb_each_other_decode_one_at_a_time(overrides: dict, shared: bool) -> None:
    engine = SimpleNamespace(device=torch.device("cpu"), end_ids=frozenset([EOS]), model=SimpleNamespace(decoder=build_decoder("llama", **overrides)))
    assert InProcessBackend(engine, max_rows=4).max_rows == (4 if shared else 1)


# ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def backend_of(decoder, **options) -> InProcessBackend:
    """The backend needs three things of an engine."""
    engine = SimpleNamespace(device=torch.device("cpu"), end_ids=frozenset([EOS]), model=SimpleNamespace(decoder=decoder))
    return InProcessBackend(engine, **options)


async def read(backend: Backend, prompt: torch.Tensor, settings: GenerationSettings, *, most: int = 1000) -> list[int]:
    ids: list[int] = []
    async with aclosing(backend.decode(prompt, settings)) as tokens:
        async for run in tokens:
            ids += run
            if len(ids) >= most:
                break
    return ids


def test_many_readers_at_once_each_get_their_own() -> None:
    decoder = build_decoder("llama")
    prompts = prompts_of(decoder, 30)
    settings = [settings_of(seed) for seed in range(30)]
    rng = random.Random(0)
    backend = backend_of(decoder, max_rows=5)
    assert isinstance(backend, Backend)
    widest = 0

    async def one(prompt: torch.Tensor, own: GenerationSettings, most: int) -> list[int]:
        nonlocal widest
        await asyncio.sleep(rng.random() * 0.05)
        ids = await read(backend, prompt, own, most=most)
        widest = max(widest, len(backend.batch.rows))
        return ids

    async def everybody() -> list[list[int]]:
        most = [3 if seed % 4 == 0 else 1000 for seed in range(30)]  # every fourth goes away early
        answers = await asyncio.gather(*map(one, prompts, settings, most))
        await backend.aclose()
        return answers

    answers = asyncio.run(everybody())
    expected = [alone(decoder, prompt, own) for prompt, own in zip(prompts, settings, strict=True)]
    assert answers == [ids[:3] if seed % 4 == 0 else ids for seed, ids in enumerate(expected)]
    assert 1 < widest <= 5


def test_stop_strings_end_a_row_and_leave_the_others(tokenizer) -> None:
    decoder = build_decoder("llama")
    prompts = prompts_of(decoder, 3)
    settings = GenerationSettings(max_new_tokens=30)
    whole = [alone(decoder, prompt, settings) for prompt in prompts]
    text = tokenizer.decode(whole[1], skip_special_tokens=True)
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    backend = backend_of(decoder)

    async def until_stop() -> TextFeed:
        feed = TextFeed(tokenizer, end_token_ids(decoder, tokenizer), (stop,))
        async with aclosing(backend.decode(prompts[1], settings)) as tokens:
            async for run in tokens:
                for token_id in run:
                    feed.push(token_id)
                if feed.finished:
                    break
        feed.close()
        return feed

    async def together() -> tuple[list[int], TextFeed, list[int]]:
        return await asyncio.gather(read(backend, prompts[0], settings), until_stop(), read(backend, prompts[2], settings))

    first, feed, last = asyncio.run(together())
    assert [first, last] == [whole[0], whole[2]]
    assert feed.finished and feed.text == text[: text.index(stop)].strip()
    assert feed.num_tokens < 30


def test_cancelling_a_reader_frees_its_row() -> None:
    decoder = build_decoder("llama")
    prompts = prompts_of(decoder, 2)
    backend = backend_of(decoder, max_rows=1)

    async def scene() -> list[int]:
        endless = asyncio.create_task(read(backend, prompts[0], GenerationSettings(max_new_tokens=400)))
        waiting = asyncio.create_task(read(backend, prompts[1], GenerationSettings(max_new_tokens=400)))
        other = asyncio.create_task(read(backend, prompts[1], GenerationSettings(max_new_tokens=5)))
        while not backend.batch.rows:
            await asyncio.sleep(0.001)
        waiting.cancel()
        endless.cancel()
        return await asyncio.wait_for(other, 120)

    assert asyncio.run(scene()) == alone(decoder, prompts[1], GenerationSettings(max_new_tokens=5))
    assert backend.batch.rows == []


def test_cache_slots_are_never_overbooked() -> None:
    decoder = build_decoder("llama")
    prompts = [prompt[:1].repeat(10, 1) for prompt in prompts_of(decoder, 6)]
    backend = backend_of(decoder, max_rows=6, max_slots=60)  # three rows of 10 + 10
    seen = []

    async def one(prompt: torch.Tensor) -> None:
        async with aclosing(backend.decode(prompt, GenerationSettings(max_new_tokens=10))) as tokens:
            async for _ in tokens:
                seen.append(len(backend.batch.rows))

    async def scene() -> None:
        await asyncio.gather(*map(one, prompts))

    asyncio.run(scene())
    assert max(seen) == 3


def test_a_failing_forward_is_told_to_those_in_it_and_the_next_ones_go_on(caplog) -> None:
    decoder = build_decoder("llama")
    prompts = prompts_of(decoder, 2)
    wrong = torch.zeros(3, 7)  # not the decoder's width
    settings = GenerationSettings(max_new_tokens=20)
    backend = backend_of(decoder)

    async def scene() -> tuple:
        running = asyncio.create_task(read(backend, prompts[0], settings))
        while not backend.batch.rows:
            await asyncio.sleep(0.001)
        failed = await asyncio.gather(read(backend, wrong, settings), return_exceptions=True)
        return await running, failed[0], await read(backend, prompts[1], settings)

    first, error, second = asyncio.run(scene())
    assert [first, second] == [alone(decoder, prompt, settings) for prompt in prompts]
    assert isinstance(error, BackendError) and str(error) == "The decoder failed (RuntimeError): see the log."
    assert "The decoder failed." in caplog.text


def test_closing_ends_everybody_with_one_sentence() -> None:
    decoder = build_decoder("llama")
    prompt = prompts_of(decoder, 1)[0]
    backend = backend_of(decoder, max_rows=1)

    async def scene() -> list:
        tasks = [asyncio.create_task(read(backend, prompt, GenerationSettings(max_new_tokens=400))) for _ in range(3)]
        while not backend.batch.rows:
            await asyncio.sleep(0.001)
        await backend.check()
        await backend.aclose()
        with pytest.raises(BackendError):
            await backend.check()
        return await asyncio.gather(*tasks, read(backend, prompt, GenerationSettings()), return_exceptions=True)

    errors = asyncio.run(scene())
    assert {str(error) for error in errors} == {"The server is shutting down: send the request again, to another one."}
