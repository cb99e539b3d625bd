"""One thin `transformers.Trainer` subclass: a weighted next-token loss over layouts, answers counted, nothing skipped in silence."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..errors import InputError, RefragError
from .optimizer import MuonAdamW


class NonFiniteLossError(RefragError, FloatingPointError):
    """The loss became infinite or not a number: the run stops instead of skipping the batch."""


def next_token_loss(logits: Tensor, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weighted mean of the next-token loss in nats, and which labels the logits predict.

    `logits` [batch slot vocab]; `labels` and `weights` [batch slot], not shifted; a label of -100 carries no loss.
    Returns a scalar and a bool tensor [batch slot-1].
    """
    predicted, labels = logits[:, :-1], labels[:, 1:]
    losses = nn.functional.cross_entropy(predicted.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none").view(labels.shape)
    weight = (labels != -100).float() if weights is None else weights[:, 1:]
    return (losses * weight).sum() / weight.sum().clamp(min=1e-6), predicted.argmax(-1) == labels


def apart(segments: Tensor) -> dict[str, Tensor]:
    """Attention mask and positions with which many questions follow one context without seeing each other.

    `segments` [batch slot]: 0 for the context, n for the n-th question and its answer. Every question stands right behind
    the context, as it does when it is asked alone. Returns a bool mask [batch 1 slot slot] and positions [batch slot].
    """
    same = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    mask = same.tril()
    return {"attention_mask": mask[:, None], "position_ids": mask.sum(-1) - 1}


class RefragTrainer(Trainer):
    """Trains a `RefragModel` on layouts, or any causal LM on token ids.

    A batch is a dict: `labels` and perhaps `loss_weights` [batch slot] (not shifted), `answers` [batch slot] (0: none, n: token of the row's n-th answer),
    `segments` [batch slot] (see `apart`), `name` (what the batch is, for the log), and either `input_ids` or what `RefragModel.forward` takes (`layout`, `encoder_input_ids`, …).
    Logs, beside the loss, the share of answers predicted in full: for greedy decoding exactly the exact match.
    """

    def __init__(self, *args: Any, optimizer_name: str = "adamw", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if optimizer_name not in ("adamw", "muon"):
            raise InputError(f"The optimizer must be adamw or muon, was {optimizer_name!r}.")
        self.optimizer_name = optimizer_name
        self._tallies: dict[str, list[float]] = {}

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None and self.optimizer_name == "muon":
            assert self.model is not None
            self.optimizer = MuonAdamW(self.model, lr=self.args.learning_rate, weight_decay=self.args.weight_decay)
        return super().create_optimizer(model) if self.optimizer is None else self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        batch = dict(inputs)
        labels, weights, answers, name, segments = (batch.pop(key, None) for key in ("labels", "loss_weights", "answers", "name", "segments"))
        if segments is not None:
            batch |= {"labels": None, **apart(segments)}
        outputs = model(**batch)
        loss, correct = next_token_loss(outputs.logits, labels, weights)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(f"The loss was {loss.item()} at step {self.state.global_step} on batch {name!r}: lower the learning rate or train in fp32.")
        if model.training:
            self._tally(name or "train", loss, correct, answers)
        return (loss, outputs) if return_outputs else loss

    def _tally(self, name: str, loss: Tensor, correct: Tensor, answers: Tensor | None) -> None:
        """Add up the loss and the answers that are right in full, by the name of the batch."""
        tally = self._tallies.setdefault(name, [0.0, 0, 0, 0])
        tally[0] += loss.item()
        tally[1] += 1
        if answers is None:
            return
        shifted = answers[:, 1:]
        keys = shifted + torch.arange(len(shifted), device=shifted.device)[:, None] * (int(answers.max()) + 1)
        wrong = torch.zeros(int(keys.max()) + 1, device=keys.device).index_add_(0, keys.flatten(), (~correct).float().flatten())
        present = keys[shifted > 0].unique()
        tally[2] += float((wrong[present] == 0).sum())
        tally[3] += len(present)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for name, (loss, batches, right, asked) in self._tallies.items():
            logs[f"{name}/loss"] = round(loss / batches, 4)
            if asked:
                logs[f"{name}/exact_match"] = round(right / asked, 4)
        self._tallies.clear()
        super().log(logs, *args, **kwargs)
