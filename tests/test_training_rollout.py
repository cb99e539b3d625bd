"""What the policy learns from: rewards against the plain decoder, draws, the rollouts' file, the order of steps, and the data."""

import json
import random
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from refrag.errors import InputError
from refrag.layout import lay_out
from refrag.policy import MASKED
from refrag.text import Passage, PromptBuilder
from refrag.training import rollout as rollout_module
from refrag.training.policy import RULES, draw_picks
from refrag.training.policy_data import RolloutSteps, build_items, policy_steps
from refrag.training.rollout import (
    PolicyItem,
    choices,
    chosen,
    load_rollouts,
    num_picks,
    rewards,
    roll_out,
    save_rollouts,
    sense,
    share_chunk_table,
)
from refrag.training.settings import PolicySettings

SIGN = "A lighthouse"


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(policy={"hidden_width": 16, "num_layers": 1, "num_heads": 2})


@lru_cache
def builder_of(tokenizer):
    return PromptBuilder(tokenizer, chunk_size=4)


@lru_cache(maxsize=1000)
def make_item(model, seed, num_passages=5):
    """Passages of nonsense, one of which starts with SIGN: those chunks are gold."""
    rng = random.Random(seed)
    texts = ["".join(rng.choice("abcdefgh ") for _ in range(14)) for _ in range(num_passages)]
    sign = rng.randrange(num_passages)
    texts[sign] = SIGN
    builder = builder_of(model.tokenizer)
    prompt = builder.build("Where is the light?", [Passage(str(n), text) for n, text in enumerate(texts)])
    gold = [chunk.passage == sign and chunk.start == 0 for chunk in prompt.chunks]
    return PolicyItem(prompt, builder.encode(" beside the old mill"), "Where is the light?", gold, f"row-{seed}")


class Made(torch.utils.data.Dataset):
    """Row i is the item of seed i."""

    def __init__(self, model):
        self.model = model

    def __getitem__(self, row):
        return make_item(self.model, row)


def finds_gold(model, item, chunk_embeds, expand_masks):
    """A reward that is quick to compute: 1 where a gold chunk is expanded."""
    return (expand_masks & torch.tensor(item.gold)).any(1).float()


# ── rewards ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_all_rows_share_one_chunk_table(prompts):
    prompt = prompts[1]
    masks = [[number == row for number in range(len(prompt.chunks))] for row in (0, 1)]
    layout, shared = lay_out([prompt] * 2, masks), share_chunk_table(lay_out([prompt] * 2, masks))
    tokens, chunks = len(layout.token_ids), len(prompt.chunks)
    assert shared.num_chunks == chunks and layout.num_chunks == 2 * chunks
    in_order = [[source - tokens for source in row.tolist() if source >= tokens] for row in shared.source]
    assert in_order == [list(range(1, chunks)), [0, *range(2, chunks)]]
    assert torch.equal(shared.source[layout.source < tokens], layout.source[layout.source < tokens])


def some_masks(item, count=5):
    return torch.rand(count, len(item.prompt.chunks), generator=torch.Generator().manual_seed(0)) < 0.3


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt_neox"])
@pytest.mark.parametrize("limit", [1 << 16, 1])
def test_rewards_of_a_group_are_those_of_plain_layouts_one_at_a_time(make_model, kind, limit, monkeypatch):
    monkeypatch.setattr(rollout_module, "MAX_SLOTS", limit)  # 1: one row at a time
    model = make_model(kind)
    item = make_item(model, 0)
    vectors, masks = model.encode(item.prompt.chunk_texts()), some_masks(item)
    alone = []
    for mask in masks:
        layout = lay_out([item.prompt], [mask], completions=[item.completion])
        with torch.no_grad():
            alone.append(-model(layout=layout, chunk_embeds=vectors).loss)
    torch.testing.assert_close(rewards(model, item, vectors, masks), torch.stack(alone), atol=1e-5, rtol=1e-5)


def test_the_reward_is_the_log_probability_of_the_gold_completion_alone(model):
    item = make_item(model, 1)
    vectors = model.encode(item.prompt.chunk_texts())
    everything = torch.ones(1, len(item.prompt.chunks), dtype=torch.bool)
    ids = torch.tensor([item.prompt.token_ids() + item.completion])
    with torch.no_grad():
        logp = model.decoder(input_ids=ids).logits[0, :-1].log_softmax(-1)
    gold = [logp[place - 1, ids[0, place]].item() for place in range(len(item.prompt.token_ids()), ids.shape[1])]
    assert rewards(model, item, vectors, everything).item() == pytest.approx(sum(gold) / len(gold), abs=1e-5)
    other = rewards(model, replace(item, question="Who?", gold=None), vectors, everything)
    assert other.item() == rewards(model, item, vectors, everything).item()
    assert rewards(model, replace(item, completion=item.completion[:1]), vectors, everything).item() == pytest.approx(gold[0], abs=1e-5)


def test_equal_sets_have_equal_rewards_to_the_last_bit(model):
    item = make_item(model, 2)
    masks = some_masks(item, 3)[[0, 1, 0, 2, 1, 0]]
    given = rewards(model, item, model.encode(item.prompt.chunk_texts()), masks).tolist()
    assert given[0] == given[2] == given[5] and given[1] == given[4] and len(set(given)) == 3


# ── rollouts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_exactly_the_picks_are_drawn_none_twice_and_never_padding(model):
    items = [make_item(model, 3, num_passages=2), make_item(model, 4, num_passages=6)]
    counts = [len(item.prompt.chunks) for item in items]
    picks = [3, counts[1] // 2]
    drawn = roll_out(model, items, picks=picks, group_size=20, generator=torch.Generator().manual_seed(0), reward=finds_gold)
    assert drawn.indices.shape == (2, 20, picks[1]) and drawn.num_picks.tolist() == picks
    for row, (num, count) in enumerate(zip(picks, counts, strict=True)):
        for own in drawn.indices[row].tolist():
            assert len(set(own[:num])) == num and max(own[:num]) < count and min(own[:num]) >= 0
            assert own[num:] == [-1] * (picks[1] - num)
    assert (drawn.old_log_probs[0, :, 3:] == 0).all() and (drawn.old_log_probs[0, :, :3] < 0).all()
    hit = [[any(items[row].gold[place] for place in own if place >= 0) for own in drawn.indices[row].tolist()] for row in (0, 1)]
    assert drawn.rewards.tolist() == [[float(one) for one in row] for row in hit]


def test_the_policy_sees_an_item_the_same_beside_a_longer_one(model):
    short, long = make_item(model, 5, num_passages=2), make_item(model, 6, num_passages=6)
    alone, beside = sense(model, [short]), sense(model, [short, long])
    gold = [each.pop("gold") for each in (alone, beside)]
    count = len(short.prompt.chunks)
    assert gold[1][0, :count].tolist() == short.gold and not gold[1][0, count:].any()
    with torch.no_grad():
        one, two = model.policy(**alone), model.policy(**beside)
    torch.testing.assert_close(one[0], two[0, :count], atol=1e-5, rtol=1e-5)
    assert (two[0, count:] == MASKED).all()


def test_the_budget_is_the_one_of_inference(model):
    item = make_item(model, 7)
    inputs = rollout_module.PolicyInputs(torch.zeros(100, 2), torch.ones(100, dtype=torch.long), torch.zeros(100, dtype=torch.long))
    for fraction in (0.05, 0.29, 0.57, 1.0):
        assert num_picks(fraction, 100) == int(chosen("first", inputs, expand_fraction=fraction).sum()) == round(100 * fraction)
    assert num_picks(0.19, 10) == 1 and num_picks(0.09, 10) == 0
    generator = torch.Generator().manual_seed(0)
    assert {draw_picks((0.01, 0.1, 0.5), 20, generator) for _ in range(50)} == {2, 10}
    assert draw_picks((0.01,), 20, generator) == 0
    assert len(choices(model, item, fractions=(0.1, 0.5), rules=RULES, reward=finds_gold)) == 10
    assert len(choices(model, replace(item, question="x", gold=None), fractions=(0.1,), rules=("random", "similarity"), reward=finds_gold_of(item))) == 2


def finds_gold_of(item):
    return lambda model, other, chunk_embeds, expand_masks: finds_gold(model, item, chunk_embeds, expand_masks)


def test_rollouts_come_back_from_a_file_bit_for_bit(model, tmp_path):
    drawn = roll_out(model, [make_item(model, 8)], picks=[2], group_size=3, generator=torch.Generator().manual_seed(0))
    save_rollouts({0: drawn, 3: replace(drawn, question_embeds=None)}, tmp_path / "rollout.safetensors")
    back = load_rollouts(tmp_path / "rollout.safetensors", torch.device("cpu"))
    assert back.keys() == {0, 3} and back[0].ids == drawn.ids and back[3].question_embeds is None
    for name in ("chunk_embeds", "indices", "old_log_probs", "rewards", "question_embeds", "chunk_mask"):
        assert torch.equal(getattr(back[0], name), getattr(drawn, name))
    save_rollouts({}, tmp_path / "none.safetensors")
    assert load_rollouts(tmp_path / "none.safetensors", torch.device("cpu")) == {}


def test_an_item_must_have_something_to_choose_and_something_to_predict(model):
    item = make_item(model, 9)
    with pytest.raises(InputError, match="The gold text of row 'row-9' must have a token or more, was empty"):
        replace(item, completion=[])
    with pytest.raises(InputError, match="The context of row 'row-9' must have a chunk or more, has none"):
        replace(item, prompt=builder_of(model.tokenizer).build("Where?"))


# ── the order of steps ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_supervised_start_then_each_rollout_for_its_updates():
    settings = PolicySettings(batch_size=2, updates_per_rollout=2, supervised_steps=1)
    steps = RolloutSteps(range(1000), settings, num_steps=4, micro_batches=2)
    assert [(batch["name"][:3], batch["number"], batch["micro"], batch["items"]) for batch in (steps[n] for n in range(len(steps)))] == [
        ("sup", 0, 0, [0, 1]), ("sup", 1, 1, [2, 3]),
        ("gro", 2, 0, [4, 5]), ("gro", 3, 1, [6, 7]), ("gro", 2, 0, []), ("gro", 3, 1, []),
        ("gro", 4, 0, [8, 9]), ("gro", 5, 1, [10, 11]),
    ]  # fmt: skip
    steps = RolloutSteps(range(1000), replace(settings, objective="reinforce", supervised_steps=0), num_steps=2, micro_batches=1)
    assert [steps[n]["items"] for n in range(2)] == [[0, 1], [2, 3]]  # one update on each
    with pytest.raises(InputError, match="fewer than the run's 3 steps, were 3: raise --num-steps"):
        RolloutSteps(range(9), replace(settings, supervised_steps=3), num_steps=3, micro_batches=1)


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def question_row(number):
    passages = [{"text": f"The lamp of {number} burned red.", "is_gold": False}, {"text": f"Keeper {number} lit it; Anna {number} watched.", "title": "Watch", "is_gold": True}]
    return {"id": f"q{number}", "question": f"Who watched {number}?", "answers": [f"Anna {number}", "Red"], "passages": passages}


def test_questions_become_items_whose_gold_chunks_hold_an_answer_in_a_gold_passage(model, tmp_path):
    data = write_rows(tmp_path / "questions.jsonl", [question_row(number) for number in range(40)])
    items = build_items(model, PolicySettings(data=(data,), eval_fraction=0.2, eval_rows=3))
    assert items.counts["rows"] == 40 and len(items.evaluation) == 3 and len(items.train) == items.counts["train"]
    for row in (0, 1, len(items.train) + 1):
        item = items.train[row]
        number = item.id.removeprefix("q")
        assert item.question == f"Who watched {number}?"
        assert model.tokenizer.decode(item.completion) == f" Anna {number}</s>"
        held = [item.prompt.passages[chunk.passage].text[chunk.start : chunk.end] for chunk, gold in zip(item.prompt.chunks, item.gold, strict=True) if gold]
        assert f"Anna {number}" in "".join(held) and {item.prompt.passages[c.passage].title for c, g in zip(item.prompt.chunks, item.gold, strict=True) if g} == {"Watch"}
        assert "burned red" not in "".join(held)  # an answer, but in a passage that is not gold
    ids = [items.train[row].id for row in range(2 * len(items.train))]
    assert sorted(ids[: len(items.train)]) == sorted(ids[len(items.train) :]) and ids[: len(items.train)] != ids[len(items.train) :]
    assert items.train[3] == items.train[3]
    assert not {item.id for item in items.evaluation} & set(ids)


def test_questions_without_passages_are_refused_or_counted(model, tmp_path):
    rows = [question_row(number) for number in range(9)] + [question_row(9) | {"passages": []}]
    settings = PolicySettings(data=(write_rows(tmp_path / "questions.jsonl", rows),), eval_fraction=0.0)
    with pytest.raises(InputError, match=r"row 'q9' has none: add passages, or leave such rows out with --skip-bad"):
        build_items(model, settings)
    items = build_items(model, replace(settings, skip_bad=True))
    assert items.counts["without_passages"] == 1 and len(items.train) == 9


def test_plain_documents_become_windows_of_context_and_continuation(model, tmp_path):
    texts = [" ".join(f"word{number}x{place}" for place in range(40)) for number in range(30)]
    data = write_rows(tmp_path / "documents.jsonl", [{"id": f"d{number}", "text": text} for number, text in enumerate(texts)] + [{"text": "too short"}])
    settings = PolicySettings(data=(data,), context_tokens=32, output_tokens=10, eval_fraction=0.2, eval_rows=2)
    items = build_items(model, settings)
    assert items.counts["dropped_documents"] == 1 and len(items.evaluation) == 2
    item = items.train[0]
    assert len(item.prompt.chunks) == 8 and len(item.completion) == 10 and item.question is None and item.gold is None
    whole = builder_of(model.tokenizer).encode(texts[int(item.id.removeprefix("d"))])
    window = [*item.prompt.token_ids()[1:], *item.completion]  # without BOS
    assert any(whole[start : start + 42] == window for start in range(len(whole)))
    with pytest.raises(InputError, match=r"A window takes 101000 tokens .* lower --context-tokens"):
        build_items(model, replace(settings, context_tokens=100_000, output_tokens=1000))
    with pytest.raises(InputError, match="context_tokens must be a chunk"):
        build_items(model, replace(settings, context_tokens=3))
    with pytest.raises(InputError, match="reads its data whole"):
        build_items(model, replace(settings, streaming=True, num_steps=1))


def test_steps_of_the_stage():
    settings = PolicySettings(batch_size=4, gradient_accumulation_steps=2, supervised_steps=5, updates_per_rollout=2)
    assert policy_steps(settings, 80) == 5 + 2 * 10
    assert policy_steps(replace(settings, objective="reinforce"), 80) == 5 + 10
    assert policy_steps(replace(settings, objective="supervised", supervised_steps=0), 80) == 10
    assert policy_steps(replace(settings, num_steps=7), 80) == 7
    assert policy_steps(settings, 81) == 5 + 21  # the rows of the last step are seen too
    with pytest.raises(InputError, match="no optimizer step"):
        policy_steps(settings, 3)
