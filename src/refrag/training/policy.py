"""Stage 4, the policy (paper section 3): which T' chunks to expand, learned from the decoder's own log-perplexity.

Objectives: `grouped`, the paper's clipped one; `reinforce`, the prototype's; and a supervised start, where the chunks that
hold the answer are known. Only the policy is trained.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import TrainingArguments

from ..errors import InputError
from ..model import RefragModel
from ..policy import log_prob
from .documents import items_per_step
from .fit import StageData, first, fit
from .policy_data import RolloutSteps, build_items, check_items, policy_steps
from .rollout import Choice, PolicyItem, Reward, Rollout, choices, load_rollouts, num_picks, rewards, roll_out, save_rollouts, sense
from .settings import PolicySettings
from .trainer import NonFiniteLossError, RefragTrainer

RULES = ("learned", "similarity", "random", "first", "none")
"""What the trained policy is compared with."""

STEADY = 1e-6
"""Rewards of a group that differ by less (nats) say nothing about its chunks."""

MAX_LOG_RATIO = 20.0
"""A draw that became e^20 times as probable counts as much: its ratio would overflow."""


# ── the supervised start ─────────────────────────────────────────────────────────────────────────────────────────────


def gold_loss(logits: Float[Tensor, "batch chunk"], gold: Bool[Tensor, "batch chunk"]) -> Float[Tensor, ""]:
    """Mean negative log of a gold chunk's probability to be picked first (the policy's softmax), in nats; rows have a gold chunk."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.masked_fill(~gold, 0.0).sum(-1) / gold.sum(-1)).mean()


def gold_recall(logits: Float[Tensor, "batch chunk"], gold: Bool[Tensor, "batch chunk"], num_picks: int | Int[Tensor, "batch"]) -> float:
    """Share of gold chunks among the `num_picks` highest logits of their row."""
    picks = torch.as_tensor(num_picks, device=logits.device).expand(len(logits))
    rank = logits.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    return ((rank < picks[:, None]) & gold).sum().item() / gold.sum().item()


class PolicyWithGold(nn.Module):
    """The policy and its loss in the shape that `transformers.Trainer` trains."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self,
        chunk_embeds: Float[Tensor, "batch chunk enc"],
        chunk_mask: Bool[Tensor, "batch chunk"],
        question_embeds: Float[Tensor, "batch enc"],
        passage_index: Int[Tensor, "batch chunk"],
        gold: Bool[Tensor, "batch chunk"],
    ) -> dict[str, Any]:
        logits = self.policy(chunk_embeds, chunk_mask, question_embeds=question_embeds, passage_index=passage_index)
        return {"loss": gold_loss(logits, gold), "logits": logits}


# ── objectives ───────────────────────────────────────────────────────────────────────────────────────────────────────


def group_advantages(rewards: Float[Tensor, "batch group"]) -> Float[Tensor, "batch group"]:
    """(r - mean) / std within each group, std over the group itself (not n - 1); 0 where all rewards are equal."""
    spread = rewards.std(-1, correction=0, keepdim=True)
    return torch.where(spread > STEADY, (rewards - rewards.mean(-1, keepdim=True)) / spread.clamp(min=STEADY), 0.0)


def leave_one_out(rewards: Float[Tensor, "batch group"]) -> Float[Tensor, "batch group"]:
    """Each reward less the mean of the others in its group: a baseline that does not bias the gradient. A group of one has none."""
    size = rewards.shape[-1]
    return rewards if size == 1 else (rewards - rewards.mean(-1, keepdim=True)) * (size / (size - 1))


def grouped_loss(logits: Float[Tensor, "batch chunk"], rollout: Rollout, *, clip: float) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """The paper's objective, negated: mean over items and group of 1/T' sum_t min(ratio * A, clip(ratio, 1 ± `clip`) * A).

    `logits` are the policy's now, the rollout's draws and their probabilities those of the policy that drew. Returns the
    loss and what to log.
    """
    ratio = (_log_probs(logits, rollout) - rollout.old_log_probs).clamp(max=MAX_LOG_RATIO).exp()
    advantages = group_advantages(rollout.rewards)[..., None]
    loss = -_per_pick(torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages), rollout).mean()
    drawn = ratio.detach()[rollout.indices >= 0]
    clipped = (drawn - 1).abs() > clip
    stats = {"ratio": drawn.mean().item(), "clip_fraction": clipped.float().mean().item()} if len(drawn) else {}
    return loss, stats | policy_stats(logits, rollout)


def reinforce_loss(logits: Float[Tensor, "batch chunk"], rollout: Rollout) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """REINFORCE, negated: mean over items and group of 1/T' sum_t log pi(l_t) * (r - mean reward of the others). No clipping.

    For one update on each rollout. Returns the loss and what to log.
    """
    advantages = leave_one_out(rollout.rewards)[..., None]
    return -_per_pick(_log_probs(logits, rollout) * advantages, rollout).mean(), policy_stats(logits, rollout)


def _log_probs(logits: Float[Tensor, "batch chunk"], rollout: Rollout) -> Float[Tensor, "batch group pick"]:
    return log_prob(logits[:, None].expand(-1, rollout.indices.shape[1], -1), rollout.indices)


def _per_pick(values: Float[Tensor, "batch group pick"], rollout: Rollout) -> Float[Tensor, "batch group"]:
    """1/T' sum over the real picks."""
    real = rollout.indices >= 0
    return (values * real).sum(-1) / real.sum(-1).clamp(min=1)


def entropy(logits: Float[Tensor, "batch chunk"]) -> Float[Tensor, ""]:
    """Mean entropy, in nats, of the first pick: the softmax over a row's chunks."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1).mean()


@torch.no_grad()
def policy_stats(logits: Float[Tensor, "batch chunk"], rollout: Rollout) -> dict[str, float]:
    """Reward and its spread in a group, entropy, groups without any spread, picks, and (where gold is known) evidence recall."""
    spread = rollout.rewards.std(-1, correction=0)
    stats = {
        "reward": rollout.rewards.mean().item(),
        "reward_std": spread.mean().item(),
        "zero_variance": (spread <= STEADY).float().mean().item(),
        "entropy": entropy(logits).item(),
        "picks": rollout.num_picks.float().mean().item(),
    }
    if rollout.gold.any():
        stats["evidence_recall"] = gold_recall(logits, rollout.gold, rollout.num_picks)
    return stats


# ── the trainer ──────────────────────────────────────────────────────────────────────────────────────────────────────


class PolicyTrainer(RefragTrainer):
    """Trains a RefragModel's policy, and nothing else of it, on `RolloutSteps`; checkpoints hold the policy and the rollout in use.

    `model` is put in eval mode, its other parts are frozen. `eval_dataset` is a list of PolicyItems. Beside what every
    stage logs: reward (nats a token), reward_std, entropy (nats), ratio, clip_fraction, evidence_recall, zero_variance, picks.
    """

    def __init__(self, *, model: RefragModel, args: TrainingArguments, settings: PolicySettings, reward: Reward = rewards, **kwargs: Any) -> None:
        """`reward` scores the masks. Raises InputError for a model without a policy."""
        self.refrag, self.settings, self.reward = freeze_all_but_policy(model), settings, reward
        args = copy.copy(args)
        args.gradient_checkpointing = args.activation_checkpointing = False  # what is frozen runs without gradient
        args.per_device_train_batch_size, args.remove_unused_columns = 1, False
        super().__init__(model=model.policy, args=args, data_collator=kwargs.pop("data_collator", first), **kwargs)
        self.refrag.to(self.args.device)
        self._rollouts: dict[int, Rollout] = {}
        self._stats: dict[str, list[float]] = defaultdict(list)

    # ── the loss ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        items = inputs["items"]
        self._tokens += sum(item.num_tokens for item in items)
        batch = inputs | self._looked_at(inputs)
        self._batches.append(batch)
        loss, stats = self._objective(model, batch)
        if not torch.isfinite(loss):
            self._stop(model, "loss", loss.item(), [batch])
        self._tally(inputs["name"], loss, torch.zeros(0), None)
        for name, value in stats.items():
            self._stats[name].append(value)
        return (loss, stats) if return_outputs else loss

    def _losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any, Any]:
        """The loss again, without drawing again: what the search for the first non-finite module runs."""
        return self._objective(model, inputs)[0], None, None

    def _looked_at(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the policy sees in this step: rows with gold, or a rollout, drawn now or kept from the step before."""
        items = inputs["items"]
        if inputs["name"] == "supervised":
            with self.accelerator.autocast():
                sensed = sense(self.refrag, items)
            return {"sensed": sensed, "rows": [item.id for item in items]}
        if items:
            self._rollouts[inputs["micro"]] = self._roll_out(items, inputs["number"])
        rollout = self._rollouts[inputs["micro"]]
        return {"rollout": rollout, "rows": list(rollout.ids)}

    def _roll_out(self, items: Sequence[PolicyItem], number: int) -> Rollout:
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence((self.settings.seed, number)).generate_state(1)[0]))
        picks = [draw_picks(self.settings.expand_fractions, len(item.prompt.chunks), generator) for item in items]
        with self.accelerator.autocast():
            rollout = roll_out(self.refrag, items, picks=picks, group_size=self.settings.group_size, generator=generator, reward=self.reward)
        finite = rollout.rewards.isfinite().all(-1).tolist()
        if not all(finite):
            row = finite.index(False)
            raise NonFiniteLossError(
                f"The reward was {rollout.rewards[row].tolist()} at step {self.state.global_step} on row {rollout.ids[row]!r}: "
                "the decoder's probabilities are not finite there, run refrag doctor on the model."
            )
        return rollout

    def _objective(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        if "sensed" in inputs:
            return self._supervised(model, dict(inputs["sensed"]))
        rollout = inputs["rollout"]
        logits = model(**rollout.policy_inputs)
        loss, stats = grouped_loss(logits, rollout, clip=self.settings.clip) if self.settings.objective == "grouped" else reinforce_loss(logits, rollout)
        return (loss - self.settings.entropy_weight * entropy(logits) if self.settings.entropy_weight else loss), stats

    def _supervised(self, model: nn.Module, sensed: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """The gold loss of the rows that have gold chunks; how many have is logged."""
        gold = sensed.pop("gold")
        logits = model(**sensed)
        marked = gold.any(1)
        stats = {"entropy": entropy(logits.detach()).item(), "with_gold": marked.float().mean().item()}
        if not marked.any():
            return logits.masked_fill(~sensed["chunk_mask"], 0.0).sum() * 0.0, stats
        fraction = fmean(self.settings.expand_fractions)
        picks = sensed["chunk_mask"].sum(1).mul(fraction).long().clamp(min=1)
        return gold_loss(logits[marked], gold[marked]), stats | {"evidence_recall": gold_recall(logits, gold, picks)}

    # ── log and evaluation ───────────────────────────────────────────────────────────────────────────────────────────

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            stats: dict[str, list[float]] = defaultdict(list)
            for own in self.gathered(dict(self._stats)):
                for name, values in own.items():
                    stats[name] += values
            logs |= {name: round(fmean(values), 6) for name, values in stats.items()}
            self._stats.clear()
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Of the policy's greedy choice over all budgets: `eval_reward`, `eval_loss` (the log-perplexity, its negative), `eval_evidence_recall`."""
        items: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        made = self.compare(items, rules=("learned",))
        reward, gold = fmean(choice.reward for choice in made), sum(choice.gold for choice in made)
        metrics = {f"{metric_key_prefix}_reward": reward, f"{metric_key_prefix}_loss": -reward}
        metrics |= {f"{metric_key_prefix}_evidence_recall": sum(choice.found for choice in made) / gold} if gold else {}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def compare(self, items: Sequence[PolicyItem], *, rules: Sequence[str] = RULES) -> list[Choice]:
        """What each rule chooses for each item at each of the settings' budgets; the items are shared among the processes."""
        made: list[Choice] = []
        for number in range(self.args.process_index, len(items), self.args.world_size):
            with self.accelerator.autocast():
                made += choices(self.refrag, items[number], fractions=self.settings.expand_fractions, rules=rules, seed=number, reward=self.reward)
        return gather_object(made)

    # ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_rollouts(self._rollouts, self._rollout_file(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._rollouts = load_rollouts(self._rollout_file(checkpoint), self.args.device)

    def _rollout_file(self, folder: str) -> Path:
        return Path(folder) / f"rollout_{self.args.process_index}.safetensors"


def freeze_all_but_policy(model: RefragModel) -> RefragModel:
    """The model in eval mode, with a policy in float32 that is trained and nothing else. Raises InputError where it has none."""
    if model.policy is None:
        raise InputError("This model has no policy to train (its config says kind 'none'): build one with policy={'kind': 'transformer'}.")
    model.eval().requires_grad_(False)
    model.policy.float().requires_grad_(True)
    return model


def draw_picks(expand_fractions: Sequence[float], num_chunks: int, generator: torch.Generator) -> int:
    """T' of a budget drawn from those that allow a pick at all; 0 where none does."""
    allowed = [picks for fraction in expand_fractions if (picks := num_picks(fraction, num_chunks))]
    return allowed[int(torch.randint(len(allowed), (), generator=generator))] if allowed else 0


# ── the stage ────────────────────────────────────────────────────────────────────────────────────────────────────────


def prepare(model: RefragModel, settings: PolicySettings) -> StageData:
    """Only the policy is trained; returns the data: `RolloutSteps`, and PolicyItems to evaluate on. Raises InputError for data nothing can be learned from."""
    freeze_all_but_policy(model)
    items = build_items(model, settings)
    check_items(model, items.train, settings)
    num_steps = policy_steps(settings, len(items.train))
    steps = RolloutSteps(items.train, settings, num_steps=num_steps, micro_batches=items_per_step(settings))
    return StageData(steps, items.evaluation or None, num_steps, items.counts, items.fingerprint)


def run(settings: PolicySettings) -> dict[str, Any]:
    """Train, or go on, and write `model/`; the result also compares the policy with the fixed rules at equal budgets.

    Raises InputError for settings and data that cannot be trained with, NonFiniteLossError when the loss stops being a number.
    """
    return fit(settings, "policy", prepare, trainer_class=partial(PolicyTrainer, settings=settings), conclude=_conclude)


def _conclude(trainer: PolicyTrainer, data: StageData) -> dict[str, Any]:
    trainer.refrag.config.policy["trained"] = True
    return policy_result(trainer, data.evaluation or [])


def train_policy(
    model: RefragModel,
    train_items: Any,
    *,
    eval_items: Sequence[PolicyItem],
    settings: PolicySettings,
    training_arguments: TrainingArguments,
    **trainer_settings: Any,
) -> dict[str, Any]:
    """Train the model's policy for `training_arguments.max_steps` steps, and compare it with the fixed rules on `eval_items`.

    `train_items[row]` is a PolicyItem for any row from 0 on. `trainer_settings` go to PolicyTrainer (`callbacks`,
    `optimizer_name`, `reward`), but for `checkpoint`, the folder to go on from. Marks the policy as trained. Returns steps,
    first and last reward, and the comparison. Raises InputError for items that nothing can be learned from.
    """
    check_items(model, train_items, settings)
    checkpoint = trainer_settings.pop("checkpoint", None)
    micro_batches = training_arguments.gradient_accumulation_steps * training_arguments.world_size
    steps = RolloutSteps(train_items, settings, num_steps=training_arguments.max_steps, micro_batches=micro_batches)
    trainer = PolicyTrainer(
        model=model, args=training_arguments, settings=settings, train_dataset=steps, eval_dataset=list(eval_items) or None, **trainer_settings
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    model.config.policy["trained"] = True
    return policy_result(trainer, eval_items)


def policy_result(trainer: PolicyTrainer, eval_items: Sequence[PolicyItem]) -> dict[str, Any]:
    """Steps, the first and the last reward logged, and the rules at equal budgets over the evaluation items."""
    logged = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    rewards = {"first_reward": logged[0], "last_reward": logged[-1]} if logged else {}
    return {"objective": trainer.settings.objective, "steps": trainer.state.global_step, **rewards, "comparison": comparison(trainer.compare(eval_items))}


def comparison(made: Sequence[Choice]) -> list[dict[str, Any]]:
    """One row per budget and rule: mean reward, how far the learned policy is above it (mean and standard error, paired), evidence recall and hits.

    `evidence_recall` is the share of gold chunks that are expanded, `evidence_hits` the share of items with one or more of theirs.
    """
    by_rule: dict[tuple[float, str], list[Choice]] = defaultdict(list)
    for choice in made:
        by_rule[choice.expand_fraction, choice.rule].append(choice)
    rows = []
    for (fraction, rule), own in by_rule.items():
        marked = [choice for choice in own if choice.gold]
        row: dict[str, Any] = {"expand_fraction": fraction, "rule": rule, "rows": len(own), "reward": fmean(choice.reward for choice in own)}
        learned = by_rule.get((fraction, "learned"), [])
        if rule != "learned" and len(learned) == len(own):
            gains = torch.tensor([better.reward - choice.reward for better, choice in zip(learned, own, strict=True)], dtype=torch.float64)
            row |= {"learned_gain": gains.mean().item(), "learned_gain_se": gains.std().item() / math.sqrt(len(gains)) if len(gains) > 1 else None}
        if marked:
            row |= {
                "evidence_recall": sum(choice.found for choice in marked) / sum(choice.gold for choice in marked),
                "evidence_hits": fmean(choice.found > 0 for choice in marked),
            }
        rows.append(row)
    return rows
