"""One thin `transformers.Trainer` subclass: a weighted next-token loss over layouts, answers counted, nothing skipped in silence."""

import inspect
import resource
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from ..errors import InputError, RefragError
from ..layout import IGNORED, PADDING
from .batches import padding
from .checkpoints import save_whole
from .finite import explain, first_non_finite
from .optimizer import MuonAdamW

OPTIMIZERS = ("adamw", "adamw_8bit", "muon")
MAX_SKIPPED = 50
"""Optimizer steps in a row that fp16's loss scaling may skip before the run stops; each is counted in the log."""


class NonFiniteLossError(RefragError, FloatingPointError):
    """The loss or a gradient became infinite or not a number: the run stops instead of skipping the batch."""


def next_token_loss(logits: Tensor, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weighted mean of the next-token loss in nats, and which labels the logits predict.

    `logits` [batch slot vocab]; `labels` and `weights` [batch slot], not shifted; a label of -100 carries no loss.
    Returns a scalar and a bool tensor [batch slot-1].
    """
    losses, correct = token_losses(logits, labels)
    return weighted_mean(losses, labels, weights), correct


def weighted_mean(losses: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of `losses` [batch slot-1] over the labels that count, each with its weight if there are weights [batch slot]."""
    weight = (labels[:, 1:] != -100).float() if weights is None else weights[:, 1:]
    return (losses * weight).sum() / weight.sum().clamp(min=1e-6)


def token_losses(logits: Tensor, labels: Tensor, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The next-token loss of each label in nats, 0 where it is -100, and which labels the logits predict; both [batch slot-1].

    `logits` [batch slot vocab], or with `slots` [predicting] only those of these slots, which must be all that some loss needs.
    """
    predicted, wanted = (logits[:, :-1], labels[:, 1:]) if slots is None else (logits, labels[:, slots + 1])
    losses = nn.functional.cross_entropy(predicted.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED, reduction="none").view(wanted.shape)
    correct = predicted.argmax(-1) == wanted
    if slots is None:
        return losses, correct
    shape = labels[:, 1:].shape
    return losses.new_zeros(shape).index_copy(1, slots, losses), correct.new_zeros(shape).index_copy(1, slots, correct)


def predicting_slots(labels: Tensor) -> Tensor:
    """Sorted slots whose logits some row's loss needs, and a few more, so that few sizes occur; `labels` [batch slot], not shifted."""
    needed = (labels[:, 1:] != IGNORED).any(0)
    places, others = needed.nonzero()[:, 0], (~needed).nonzero()[:, 0]
    return torch.cat([places, others[: padding(max(len(places), 1))]]).sort().values


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

    Items of the data sets are micro-batches, taken in order. A micro-batch is a dict: `labels` and perhaps `loss_weights`
    [batch slot] (not shifted), `answers` [batch slot] (0: none, n: token of the row's n-th answer), `segments` [batch slot]
    (see `apart`), `name` (what it is, for the log; one or several), `rows` (ids, for errors), and either `input_ids` or what
    `RefragModel.forward` takes (`layout`, `encoder_input_ids`, …).
    Logs, beside the loss, tokens per second, peak memory, and the share of answers predicted in full: for greedy decoding exactly the exact match.
    """

    def __init__(self, *args: Any, optimizer_name: str = "adamw", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if optimizer_name not in OPTIMIZERS:
            raise InputError(f"The optimizer must be {', '.join(OPTIMIZERS[:-1])} or {OPTIMIZERS[-1]}, was {optimizer_name!r}.")
        self.optimizer_name = optimizer_name
        self.model_accepts_loss_kwargs = False  # our loss is a mean: accumulated passes are averaged, not summed
        self._tallies: dict[str, list[float]] = {}
        self._tokens, self._since, self._skipped = 0, time.perf_counter(), 0
        self._batches: deque[dict[str, Any]] = deque(maxlen=max(1, self.args.gradient_accumulation_steps))
        """The micro-batches of the optimizer step, the latest last."""
        decoder: Any = getattr(self.model, "decoder", self.model)
        self._takes_slots = "logits_to_keep" in inspect.signature(decoder.forward).parameters

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> None:
        return None

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None and self.optimizer_name == "muon":
            assert self.model is not None
            self.optimizer = MuonAdamW(self.model, lr=self.args.learning_rate, weight_decay=self.args.weight_decay)
        return super().create_optimizer(model) if self.optimizer is None else self.optimizer

    # ── the loss ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        loss, losses, correct = self._losses(model, inputs)
        if model.training:
            self._batches.append(inputs)
            if not torch.isfinite(loss):
                self._stop(model, "loss", loss.item(), [inputs])
            self._count(inputs)
            for name in _names(inputs):
                self._tally(name, loss, correct, inputs.get("answers"))
        return (loss, {"losses": losses, "correct": correct}) if return_outputs else loss

    def _losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(the scalar to minimise, nats of each label [batch slot-1], which labels are predicted).

        Logits are made for the slots alone that some loss needs. No slot looks at padding behind it, so right-padded layouts go without a mask.
        """
        batch = dict(inputs)
        labels, weights, _, _, segments, _ = (batch.pop(key, None) for key in ("labels", "loss_weights", "answers", "name", "segments", "rows"))
        batch["labels"] = None
        if segments is not None:
            batch |= apart(segments)
        elif "layout" in batch and bool((batch["layout"].source[:, 0] != PADDING).all()):
            rows, width = batch["layout"].source.shape
            batch |= {"attention_mask": None, "position_ids": torch.arange(width, device=labels.device).expand(rows, -1)}
        slots = predicting_slots(labels) if self._takes_slots else None
        batch |= {} if slots is None else {"logits_to_keep": slots}
        losses, correct = token_losses(model(**batch).logits, labels, slots)
        return weighted_mean(losses, labels, weights), losses, correct

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called after every backward pass, before the optimizer's step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        finite = bool(torch.isfinite(torch.as_tensor(norm)))
        scaled = self.accelerator.scaler is not None  # fp16: the step is skipped, the scale lowered, and both are counted
        self._skipped = 0 if finite else self._skipped + 1
        if not finite and (not scaled or self._skipped > MAX_SKIPPED):
            self._stop(model, "gradient norm", float(norm), self._batches)
        if not finite:
            self._tallies.setdefault("skipped", [0.0, 0, 0, 0])[1] += 1
        return norm

    def _stop(self, model: nn.Module, what: str, value: float, batches: Iterable[dict[str, Any]]) -> None:
        """Raise with the step, the rows of the micro-batch that did it, the module in which it first appeared, and what to try."""
        scaler = self.accelerator.scaler
        scale = scaler.get_scale() if scaler is not None else 1.0
        finding, rows = None, []
        for inputs in batches:

            def again(inputs: dict[str, Any] = inputs) -> Tensor:
                with self.compute_loss_context_manager(), self.accelerator.autocast():
                    return self._losses(model, inputs)[0]

            finding = first_non_finite(model, again, loss_scale=scale)
            own = [str(row) for row in inputs.get("rows") or _names(inputs)]
            rows = own if finding is not None else [*rows, *own]
            if finding is not None:
                break
        reason = explain(finding, step=self.state.global_step, rows=rows, precision=self.accelerator.mixed_precision)
        raise NonFiniteLossError(f"The {what} was {value}. {reason}")

    # ── evaluation ───────────────────────────────────────────────────────────────────────────────────────────────────

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Nats a label (`eval_loss`), share of labels predicted (`eval_token_accuracy`), of rows predicted in full (`eval_exact_match`).

        Over all micro-batches of the evaluation set, shared among the processes.
        """
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        model: Any = self.model_wrapped
        rank, world = self.args.process_index, self.args.world_size
        sums = torch.zeros(5, dtype=torch.float64, device=self.args.device if self.args.device.type != "mps" else "cpu")
        was_training = model.training
        model.eval()
        for place in range(rank, len(data) + -len(data) % world, world):  # every process as often, for those that share weights
            sums += self._evaluated(model, self._prepare_inputs(data[place % len(data)])).to(sums) * (place < len(data))
        model.train(was_training)
        nats, right, labels, whole, rows = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {"loss": nats / max(labels, 1), "token_accuracy": right / max(labels, 1), "exact_match": whole / max(rows, 1), "tokens": labels}
        metrics = {f"{metric_key_prefix}_{name}": round(value, 6) for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _evaluated(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """[nats, labels predicted, labels, rows predicted in full, rows] of one micro-batch."""
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            _, losses, correct = self._losses(model, inputs)
        counted = inputs["labels"][:, 1:] != -100
        if inputs.get("loss_weights") is not None:
            counted &= inputs["loss_weights"][:, 1:] > 0
        has = counted.any(1)
        whole = (correct | ~counted).all(1) & has
        return torch.stack([(losses * counted).sum().double(), (correct & counted).sum().double(), counted.sum().double(), whole.sum().double(), has.sum().double()])

    # ── the log ──────────────────────────────────────────────────────────────────────────────────────────────────────

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

    def _count(self, inputs: dict[str, Any]) -> None:
        """Tokens of text behind a micro-batch: those of the context, compressed or not, and those with a loss."""
        layout = inputs.get("layout")
        context = sum(layout.context_tokens) if layout is not None else 0
        self._tokens += context + int((inputs["labels"] != -100).sum())

    def gathered(self, value: Any) -> list[Any]:
        """The value of every process."""
        if self.args.world_size == 1:
            return [value]
        values = [None] * self.args.world_size
        dist.all_gather_object(values, value)
        return values

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With what was counted since the last entry, on all processes."""
        skipped = self._tallies.pop("skipped", None)  # every process skips the same steps
        if skipped is not None:
            logs["skipped_steps"] = skipped[1]
        tallies: dict[str, list[float]] = {}
        for own in self.gathered(self._tallies):
            for name, tally in own.items():
                tallies[name] = [before + more for before, more in zip(tallies.get(name, [0.0] * len(tally)), tally, strict=True)]
        for name, (loss, batches, right, asked) in tallies.items():
            logs[f"{name}/loss"] = round(loss / batches, 4)
            if asked:
                logs[f"{name}/exact_match"] = round(right / asked, 4)
        self._tallies.clear()
        if "loss" in logs:
            now = time.perf_counter()
            counted = self.gathered((self._tokens, peak_memory_bytes()))
            tokens, peak = sum(tokens for tokens, _ in counted), max(peak for _, peak in counted)
            logs |= {"tokens_per_s": round(tokens / max(now - self._since, 1e-9), 1), "peak_memory_bytes": peak}
            self._tokens, self._since = 0, now
        super().log(logs, *args, **kwargs)

    # ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """A step that is the best so far is saved, whether `save_steps` names it or not: it is what the run ends with."""
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint appears when it is whole: it is written beside, then renamed. Old ones go afterwards."""
        save_whole(self, lambda: super(RefragTrainer, self)._save_checkpoint(model, trial))

    def _get_output_dir(self, trial: Any) -> str:
        return getattr(self, "staging", None) or super()._get_output_dir(trial)


def _names(inputs: dict[str, Any]) -> Sequence[str]:
    name = inputs.get("name") or "train"
    return [name] if isinstance(name, str) else name


def peak_memory_bytes() -> int:
    """Most memory used so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
