"""The policy's stage: objectives worked by hand, clipping that is real, exact resume, and that it learns."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_training_rollout import Made, finds_gold, make_item, question_row, write_rows
from transformers import TrainingArguments

from refrag.errors import InputError
from refrag.policy import MASKED, log_prob
from refrag.training.fit import make_trainer
from refrag.training.policy import (
    PolicyTrainer,
    comparison,
    entropy,
    gold_recall,
    group_advantages,
    grouped_loss,
    leave_one_out,
    policy_stats,
    prepare,
    reinforce_loss,
    train_policy,
)
from refrag.training.policy_data import RolloutSteps
from refrag.training.rollout import Choice, PolicyItem, Rollout, rewards, sense
from refrag.training.settings import PolicySettings
from refrag.training.trainer import NonFiniteLossError


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(policy={"hidden_width": 16, "num_layers": 1, "num_heads": 2})


def made_rollout(indices, old, given, num_chunks, gold=None):
    batch = len(indices)
    return Rollout(
        chunk_embeds=torch.zeros(batch, num_chunks, 2), chunk_mask=torch.ones(batch, num_chunks, dtype=torch.bool),
        passage_index=torch.zeros(batch, num_chunks, dtype=torch.long), gold=torch.tensor(gold or [[False] * num_chunks] * batch),
        indices=torch.tensor(indices), old_log_probs=torch.tensor(old), rewards=torch.tensor(given),
    )  # fmt: skip


# ── objectives, by hand ──────────────────────────────────────────────────────────────────────────────────────────────


def test_advantages_by_hand():
    assert group_advantages(torch.tensor([[1.0, 2, 3, 6], [2, 2, 2, 2]])).tolist() == [
        pytest.approx([-2 / math.sqrt(3.5), -1 / math.sqrt(3.5), 0, 3 / math.sqrt(3.5)]),
        [0, 0, 0, 0],
    ]
    assert leave_one_out(torch.tensor([[1.0, 2, 6]])).tolist() == [pytest.approx([-3, -1.5, 4.5])]
    assert leave_one_out(torch.tensor([[3.0]])).tolist() == [[3.0]]


# probabilities 1/4, 1/2, 1/4
LOGITS = torch.tensor([[0.0, math.log(2), 0.0]])


def test_the_grouped_loss_by_hand():
    # chunk 1 was drawn at 1/4, now 1/2: ratio 2, better than the mean, so only 1.2 of it counts; chunk 0 at 1/4, as now
    drawn = made_rollout([[[1], [0]]], [[[math.log(0.25)], [math.log(0.25)]]], [[1.0, 0.0]], 3)
    loss, stats = grouped_loss(LOGITS, drawn, clip=0.2)
    assert loss.item() == pytest.approx(-(1.2 - 1) / 2)
    assert stats["clip_fraction"] == 0.5 and stats["ratio"] == pytest.approx(1.5) and stats["reward"] == 0.5 and stats["reward_std"] == 0.5
    # the other way round: worse than the mean, nothing is clipped, the ratio 2 counts in full
    loss, _ = grouped_loss(LOGITS, replace(drawn, rewards=torch.tensor([[0.0, 1.0]])), clip=0.2)
    assert loss.item() == pytest.approx(-(-2 + 1) / 2)


def test_the_sum_over_picks_is_divided_by_their_number_and_padding_does_not_count():
    # 1 then 0: 1/2, then 1/4 of the 1/2 that is left; drawn at 1/2 and 1/4, so the ratios are 1 and 2
    old = [[[math.log(0.5), math.log(0.25)], [math.log(0.5), math.log(0.5)]], [[math.log(0.5), 0.0], [math.log(0.25), 0.0]]]
    drawn = made_rollout([[[1, 0], [1, 2]], [[1, -1], [0, -1]]], old, [[0.0, 1.0], [1.0, 0.0]], 3)
    loss, stats = grouped_loss(LOGITS.expand(2, -1), drawn, clip=0.2)
    first, second = (-(1 + 2) / 2 + (1 + 1) / 2) / 2, (1 - 1) / 2
    assert loss.item() == pytest.approx(-(first + second) / 2)
    assert stats["picks"] == 1.5 and stats["clip_fraction"] == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("objective", "changes"),
    [("reinforce", {"clip": 0.1}), ("reinforce", {"updates_per_rollout": 4}), ("supervised", {"clip": 0.1}), ("supervised", {"group_size": 4}), ("supervised", {"entropy_weight": 0.1}), ("supervised", {"supervised_steps": 3})],
)
def test_settings_of_the_grouped_objective_are_refused_with_another(tmp_path, objective, changes):
    with pytest.raises(InputError, match=f"{next(iter(changes))} changes nothing with the objective {objective}"):
        PolicySettings(data=("a.jsonl",), output_dir=tmp_path, objective=objective, **changes)


def test_reinforce_by_hand():
    drawn = made_rollout([[[1], [0]]], [[[0.0], [0.0]]], [[3.0, 1.0]], 3)
    loss, _ = reinforce_loss(LOGITS, drawn)
    assert loss.item() == pytest.approx(-(2 * math.log(0.5) - 2 * math.log(0.25)) / 2)


def test_what_is_logged_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, MASKED], [3.0, 2.0, 1.0, 0.0]])
    gold = [[True, False, False, False], [False, False, True, True]]
    drawn = made_rollout([[[0, -1], [1, -1]], [[2, 3], [2, 3]]], [[[0.0] * 2] * 2] * 2, [[1.0, 2.0], [5.0, 5.0]], 4, gold)
    stats = policy_stats(logits, drawn)
    second = torch.tensor([3.0, 2.0, 1.0, 0.0]).softmax(-1)
    assert stats["entropy"] == pytest.approx((math.log(3) - (second * second.log()).sum().item()) / 2)
    assert entropy(logits[:1]).item() == pytest.approx(math.log(3))
    assert stats["zero_variance"] == 0.5 and stats["reward"] == 3.25 and stats["picks"] == 1.5
    assert stats["evidence_recall"] == pytest.approx(1 / 3)  # the first row's, at 1 pick; neither of the second's, at 2
    assert gold_recall(logits, drawn.gold, 3) == pytest.approx(2 / 3)
    assert "evidence_recall" not in policy_stats(logits, replace(drawn, gold=torch.zeros(2, 4, dtype=torch.bool)))


def test_with_ratio_one_the_grouped_gradient_is_the_plain_policy_gradient():
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    indices = [[[0, 3], [5, 1], [2, 4]], [[1, 0], [0, 1], [3, -1]]]
    drawn = made_rollout(indices, [[[0.0] * 2] * 3] * 2, [[1.0, 5.0, -2.0], [0.0, 3.0, 1.0]], 6)
    new = log_prob(logits[:, None].expand(-1, 3, -1), drawn.indices)
    drawn = replace(drawn, old_log_probs=new.detach())
    loss, stats = grouped_loss(logits, drawn, clip=0.2)
    picks = torch.tensor([[2.0, 2, 2], [2, 2, 1]])
    plain = -(new.sum(-1) / picks * group_advantages(drawn.rewards)).mean()
    torch.testing.assert_close(*(torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, plain)))
    assert stats["ratio"] == 1.0 and stats["clip_fraction"] == 0.0


def test_padded_chunks_get_no_gradient_and_change_nothing():
    logits = torch.tensor([[0.5, -1.0, 2.0]], requires_grad=True)
    drawn = made_rollout([[[2, 0], [1, 0]]], [[[-0.5, -0.5]] * 2], [[1.0, 0.0]], 3)
    padded = torch.cat([logits, torch.full((1, 2), MASKED)], dim=1)
    alone, beside = grouped_loss(logits, drawn, clip=0.2)[0], grouped_loss(padded, drawn, clip=0.2)[0]
    assert alone.item() == beside.item()
    assert torch.autograd.grad(beside + entropy(padded), logits)[0].isfinite().all()


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def arguments(folder, *, steps, **changes):
    settings = {"learning_rate": 1e-2, "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "logging_nan_inf_filter": False,
                "save_strategy": "no", "lr_scheduler_type": "constant"}  # fmt: skip
    return TrainingArguments(output_dir=str(folder), max_steps=steps, **(settings | changes))


def trained(model, folder, *, steps, checkpoint=None, total=None, **changes):
    """(a copy of the model whose policy was trained, the trainer)."""
    settings = PolicySettings(batch_size=2, group_size=4, expand_fractions=(0.2,), **{"supervised_steps": 1, **changes.pop("settings", {})})
    reward, model = changes.pop("reward", finds_gold), copy.deepcopy(model)
    args = arguments(folder, steps=steps, **changes)
    data = RolloutSteps(Made(model), settings, num_steps=total or steps, micro_batches=args.gradient_accumulation_steps)
    trainer = PolicyTrainer(model=model, args=args, settings=settings, train_dataset=data, reward=reward)
    trainer.train(resume_from_checkpoint=checkpoint)
    return model, trainer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_stopped_at_any_step_and_resumed_equals_uninterrupted(model, tmp_path, accumulation):
    kwargs = {"gradient_accumulation_steps": accumulation, "reward": rewards}
    whole, _ = trained(model, tmp_path / "whole", steps=6, save_strategy="steps", save_steps=1, **kwargs)
    for step in range(1, 6):
        rest, trainer = trained(model, tmp_path / f"from-{step}", steps=6, checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"), **kwargs)
        assert trainer.state.global_step == 6
        for left, right in zip(whole.policy.parameters(), rest.policy.parameters(), strict=True):
            assert torch.equal(left, right), f"resumed at step {step}"
    kept = {path.name for path in (tmp_path / "whole" / "checkpoint-3").iterdir()}
    assert "rollout_0.safetensors" in kept


def test_only_the_policy_changes(model, tmp_path):
    after, _ = trained(model, tmp_path, steps=3)
    changed = {name.split(".")[0] for (name, old), new in zip(model.named_parameters(), after.parameters(), strict=True) if not torch.equal(old, new)}
    assert changed == {"policy"}
    assert not after.encoder.training and not after.decoder.training
    assert {name.split(".")[0] for name, parameter in after.named_parameters() if parameter.requires_grad} == {"policy"}


def test_clipping_occurs_at_the_second_update_and_not_at_the_first(model, tmp_path):
    _, trainer = trained(model, tmp_path, steps=4, learning_rate=0.05, settings={"supervised_steps": 0})
    log = [entry for entry in trainer.state.log_history if "clip_fraction" in entry]
    assert [entry["clip_fraction"] > 0 for entry in log] == [False, True, False, True]
    assert log[0]["ratio"] == log[2]["ratio"] == 1.0
    assert log[0]["reward"] == log[1]["reward"]  # one rollout
    wanted = {"loss", "reward", "reward_std", "entropy", "clip_fraction", "evidence_recall", "zero_variance", "picks", "grouped/loss", "tokens_per_s"}
    assert wanted <= log[0].keys()


def test_steps_of_the_supervised_start_are_logged_as_such(model, tmp_path):
    _, trainer = trained(model, tmp_path, steps=2)
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["with_gold"] == 1.0 and "supervised/loss" in first and "reward" not in first
    assert "grouped/loss" in second and "with_gold" not in second


def test_an_entropy_bonus_raises_the_entropy(model, tmp_path):
    _, trainer = trained(model, tmp_path, steps=8, settings={"entropy_weight": 5.0, "supervised_steps": 4})
    log = [entry["entropy"] for entry in trainer.state.log_history if "grouped/loss" in entry]
    assert log[-1] > log[0]


def test_rewards_and_losses_that_are_not_finite_stop_the_run(model, tmp_path):
    def broken(model, item, chunk_embeds, expand_masks):
        return torch.full((len(expand_masks),), math.nan)

    with pytest.raises(NonFiniteLossError, match=r"The reward was \[nan, .*at step 0 on row 'row-0'.*refrag doctor"):
        trained(model, tmp_path, steps=2, reward=broken, settings={"supervised_steps": 0})
    sick = copy.deepcopy(model)
    with torch.no_grad():
        sick.policy.logit.weight.fill_(math.nan)
    with pytest.raises(NonFiniteLossError, match=r"The loss was nan.* at step 0 on rows row-0, row-1 in fp32, logit.weight"):
        trained(sick, tmp_path, steps=2)


@pytest.mark.parametrize("settings", [{"objective": "grouped"}, {"objective": "reinforce"}])
def test_both_objectives_learn_which_chunks_matter_and_random_does_not(make_model, tmp_path, settings):
    model = make_model(policy={"kind": "mlp", "hidden_width": 32, "question_aware": False})
    chosen_by = PolicySettings(batch_size=8, group_size=8, expand_fractions=(0.1,), **settings)
    items = [make_item(model, 10_000 + row) for row in range(24)]
    result = train_policy(
        model, Made(model), eval_items=items, settings=chosen_by, training_arguments=arguments(tmp_path, steps=30, learning_rate=3e-2), reward=finds_gold
    )
    by_rule = {row["rule"]: row for row in result["comparison"]}
    assert by_rule["learned"]["reward"] > 0.9 and by_rule["learned"]["evidence_hits"] > 0.9
    assert by_rule["random"]["reward"] < 0.4 and by_rule["none"]["reward"] == 0
    assert result["last_reward"] > result["first_reward"] + 0.3
    assert by_rule["random"]["learned_gain"] == pytest.approx(by_rule["learned"]["reward"] - by_rule["random"]["reward"])
    assert model.has_trained_policy and result["steps"] == 30


def test_the_supervised_objective_learns_from_marked_chunks(make_model, tmp_path):
    model = make_model(policy={"kind": "mlp", "hidden_width": 32, "question_aware": False})
    settings = PolicySettings(batch_size=8, objective="supervised", expand_fractions=(0.1,))
    items = [make_item(model, 10_000 + row) for row in range(8)]
    result = train_policy(model, Made(model), eval_items=items, settings=settings, training_arguments=arguments(tmp_path, steps=25), reward=finds_gold)
    assert next(row for row in result["comparison"] if row["rule"] == "learned")["evidence_recall"] == 1.0


def test_evaluation_during_training_is_of_the_greedy_choice(model, tmp_path):
    items, settings = [make_item(model, row) for row in range(3)], PolicySettings(expand_fractions=(0.1, 0.2), num_steps=1)
    data = RolloutSteps(Made(model), settings, num_steps=1, micro_batches=1)
    trainer = PolicyTrainer(model=copy.deepcopy(model), args=arguments(tmp_path, steps=1), settings=settings, train_dataset=data, eval_dataset=items)
    metrics = trainer.evaluate()
    expected = []
    for item in items:
        sensed = sense(model, [item])
        sensed.pop("gold")
        logits = model.policy(**sensed)[0]
        for fraction in (0.1, 0.2):
            mask = torch.zeros(1, len(logits), dtype=torch.bool)
            mask[0, logits.topk(int(fraction * len(logits))).indices] = True
            expected.append(rewards(model, item, sensed["chunk_embeds"][0], mask).item())
    assert metrics["eval_reward"] == pytest.approx(sum(expected) / 6, abs=1e-5) == -metrics["eval_loss"]
    assert 0 <= metrics["eval_evidence_recall"] <= 1


def test_the_comparison_by_hand():
    made = [
        Choice(0.1, "learned", -1.0, 1, 2), Choice(0.1, "random", -2.0, 0, 2),
        Choice(0.1, "learned", -3.0, 0, 0), Choice(0.1, "random", -3.5, 0, 0),
        Choice(0.1, "learned", -1.0, 3, 4), Choice(0.1, "random", -1.0, 1, 4),
    ]  # fmt: skip
    learned, by_chance = comparison(made)
    assert learned == {"expand_fraction": 0.1, "rule": "learned", "rows": 3, "reward": pytest.approx(-5 / 3), "evidence_recall": 4 / 6, "evidence_hits": 1.0}
    assert by_chance["learned_gain"] == pytest.approx(0.5) and by_chance["learned_gain_se"] == pytest.approx(0.5 / math.sqrt(3))
    assert by_chance["evidence_recall"] == 1 / 6 and by_chance["evidence_hits"] == 0.5


def test_what_cannot_be_learned_from_is_refused(model, make_model, tmp_path):
    def train(model, items=None, **settings):
        settings = PolicySettings(**settings)
        train_policy(model, items or Made(model), eval_items=[], settings=settings, training_arguments=arguments(tmp_path, steps=2))

    model = copy.deepcopy(model)
    with pytest.raises(InputError, match=r"must have 100 chunks or more for one pick at expand_fraction 0.01, the longest has \d+: raise --expand-fractions"):
        train(model, expand_fractions=(0.01,))
    item = make_item(model, 0)
    with pytest.raises(InputError, match="policy looks at the question, plain documents have none"):
        train(model, [replace(item, question=None)] * 64)
    with pytest.raises(InputError, match="none of the first 64 rows has one: mark gold passages"):
        train(model, [replace(item, gold=None)] * 64, supervised_steps=1)
    with pytest.raises(InputError, match="This model has no policy to train"):
        train(make_model(policy={"kind": "none"}))




def test_the_stage_trains_on_questions_in_bf16_with_checkpoints_and_evaluation(model, tmp_path):
    data = write_rows(tmp_path / "questions.jsonl", [question_row(number) for number in range(40)])
    settings = PolicySettings(
        data=(data,), output_dir=tmp_path / "run", num_steps=4, supervised_steps=1, batch_size=2, group_size=3, expand_fractions=(0.3,), eval_fraction=0.2, eval_rows=2,
        save_every=2, log_every=1, precision="bf16", device="cpu",
    )  # fmt: skip
    model = copy.deepcopy(model)
    data = prepare(model, settings)
    trainer, _ = make_trainer(model, data, settings, partial(PolicyTrainer, settings=settings))
    trainer.train()
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert (tmp_path / "run" / "checkpoint-4" / "rollout_0.safetensors").exists()
    log = trainer.state.log_history
    assert next(entry["ratio"] for entry in log if "ratio" in entry) == pytest.approx(1, abs=1e-4)
    assert [entry["step"] for entry in log if "eval_reward" in entry] == [2, 4]
    assert {parameter.dtype for parameter in model.policy.parameters()} == {torch.float32}


@pytest.mark.slow
def test_the_decoders_own_log_perplexity_teaches_which_chunks_to_expand(tmp_path):
    from refrag.demo.almanac import make_case
    from refrag.demo.lessons import cited, evidence_chunks
    from refrag.model import load_model
    from refrag.text import PromptBuilder

    torch.manual_seed(0)
    model = load_model("bundled", device="cpu", dtype=torch.float32)
    model.policy.reset_parameters()
    builder, items = PromptBuilder(model.tokenizer, chunk_size=model.config.chunk_size), []
    for number in range(4):
        case = make_case(f"policy-test-{number}", split="held-out", num_passages=4)
        question = case.questions[0]
        prompt = builder.build(question.text, case.passages)
        completion = [*builder.encode(cited(question)), model.tokenizer.eos_token_id]
        items.append(PolicyItem(prompt, completion, question.text, evidence_chunks(prompt, [question]), str(number)))
    settings = PolicySettings(batch_size=4, group_size=8, expand_fractions=(0.1,))
    args = arguments(tmp_path, steps=60, learning_rate=3e-3, logging_steps=10)
    result = train_policy(model, items * 100, eval_items=items, settings=settings, training_arguments=args)
    by_rule = {row["rule"]: row for row in result["comparison"]}
    assert by_rule["learned"]["reward"] > max(by_rule["random"]["reward"], by_rule["none"]["reward"]) + 0.05
    assert result["last_reward"] > result["first_reward"] + 0.05
