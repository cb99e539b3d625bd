"""A few steps of training in each precision, on a copy of the model: what is not finite, out of scale or not learning, and what to do."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..encoder import encode_batch, fastest_dtype
from ..errors import InputError, first_line
from .finite import explain, first_non_finite, same_random, type_name
from .trainer import apart, next_token_loss

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions with float32 weights, and the type that autocast computes in."""
WEIGHTS = {"fp16-weights": torch.float16, "bf16-weights": torch.bfloat16}
"""Precisions without float32 weights: how the prototype trained, and why it failed."""
PRECISIONS = tuple(AUTOCAST)

MAX_GRAD_NORM = 1.0
FIRST_SCALE = 2.0**16
"""Of the loss in fp16; halved when a gradient overflows, as `torch.amp.GradScaler` does."""
MAX_SKIPPED = 16
"""Steps that fp16 may skip to find its scale."""
MAX_RATIO = 16.0
"""Most that projected chunk vectors may be larger or smaller than token embeddings: a new model has 1, a trained one was seen at 8."""
SAMPLE = 4096
"""Entries of each parameter that are looked at to see whether a step changes them."""

_NOT_INPUTS = ("labels", "loss_weights", "answers", "segments", "name", "rows")


def doctor(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    *,
    steps: int = 3,
    learning_rate: float = 5e-5,
    precisions: Sequence[str] = PRECISIONS,
    texts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train copies of `model` for some optimizer steps, one in each precision, and report; the model itself stays as it is.

    `batches` are micro-batches as `RefragTrainer` takes them, used in turn. `precisions` are of fp32, bf16, fp16 (float32 weights,
    autocast, in fp16 with loss scaling), fp16-weights and bf16-weights (weights of that type, plain Adam); the last two are added
    by themselves for a model whose trained weights have that type. `texts` are statistics of the data, shown as they are; of
    `rows` texts, `too_short` ones shorter than `min_tokens` become a problem. Everything runs on the model's device.
    Returns plain values (see `render`): device, weights, vectors, runs, texts, problems; without problems all is well.
    Raises InputError without batches or trained parameters, and for a precision that does not exist.
    """
    _check(model, batches, steps=steps, precisions=precisions)
    device = next(model.parameters()).device
    weights = weight_types(model)
    given = [name for name, dtype in WEIGHTS.items() if any(type_name(dtype) in part["trained"] for part in weights.values())]
    report: dict[str, Any] = {"device": probe(device), "weights": weights, "vectors": vector_scales(model, _moved(batches[0], device)), "runs": {}}
    for name in dict.fromkeys([*precisions, *given]):
        able = report["device"].get(name.removesuffix("-weights"), "ok")
        lacks = able.startswith("does not run")
        report["runs"][name] = _result(error=able) if lacks else _run(model, batches, name, steps=steps, learning_rate=learning_rate)
    report["texts"] = dict(texts or {})
    return report | {"problems": _problems(report)}


def _check(model: nn.Module, batches: Sequence[Any], *, steps: int, precisions: Sequence[str]) -> None:
    if not len(batches):
        raise InputError("The doctor needs one batch or more, none was given: check --data, whose texts may all be too short.")
    if steps < 1:
        raise InputError(f"steps must be 1 or more, was {steps}: try 3.")
    unknown = [name for name in precisions if name not in AUTOCAST | WEIGHTS]
    if unknown or not precisions:
        raise InputError(f"precisions must be of {', '.join(AUTOCAST | WEIGHTS)}, were {', '.join(precisions) or 'none'}.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("Nothing would be trained, every part of the model is frozen: call model.requires_grad_(True).")


# ── what is there ────────────────────────────────────────────────────────────────────────────────────────────────────


def weight_types(model: nn.Module) -> dict[str, dict[str, dict[str, int]]]:
    """Per part, how many trained and how many frozen weights there are of each type."""
    types: dict[str, dict[str, dict[str, int]]] = {}
    for part, module in model.named_children():
        counts = types[part] = {"trained": {}, "frozen": {}}
        for parameter in module.parameters():
            kind = counts["trained" if parameter.requires_grad else "frozen"]
            kind[type_name(parameter.dtype)] = kind.get(type_name(parameter.dtype), 0) + parameter.numel()
    return types


def probe(device: torch.device) -> dict[str, Any]:
    """What the device can do, tried and not assumed: a layer, a norm and attention, forward and backward, in bf16 and in fp16."""
    found: dict[str, Any] = {"name": str(device), "fastest": type_name(fastest_dtype(device))}
    exact, _ = _probe_layers(device, None)
    for precision in ("bf16", "fp16"):
        try:
            value, gradient = _probe_layers(device, AUTOCAST[precision])
        except (RuntimeError, TypeError) as error:
            found[precision] = f"does not run: {first_line(error)}"
            continue
        right = math.isfinite(gradient) and abs(value - exact) <= 0.05 * abs(exact)
        found[precision] = "ok" if right else f"gives wrong values: {value:.4g} instead of {exact:.4g}, gradients up to {gradient:.4g}"
    found["loss scaling"] = _probe_scaling(device)
    return found


def _probe_layers(device: torch.device, dtype: torch.dtype | None) -> tuple[float, float]:
    """(value, largest gradient) of a small attention layer over fixed vectors."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 4, 16, 16, generator=generator).to(device)
    weight = torch.randn(16, 16, generator=generator).to(device).requires_grad_()
    with _autocast(device, dtype):
        hidden = nn.functional.layer_norm(nn.functional.linear(rows, weight), (16,))
        hidden = nn.functional.scaled_dot_product_attention(hidden, hidden, hidden, is_causal=True)
        value = nn.functional.silu(nn.functional.linear(hidden, weight)).float().square().mean()
    value.backward()
    assert weight.grad is not None
    return value.item(), weight.grad.abs().max().item()


def _probe_scaling(device: torch.device) -> str:
    """Whether torch's own loss scaling, which the Trainer uses for fp16, works on the device."""
    weight = torch.ones(2, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    try:
        scaler = torch.amp.GradScaler(device.type)
        scaler.scale(weight.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    except (RuntimeError, TypeError) as error:
        return f"does not run: {first_line(error)}"
    return "ok"


@torch.no_grad()
def vector_scales(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, float]:
    """Root mean square of the token embeddings and of the batch's projected chunk vectors; empty where the batch has no chunks."""
    layout, vectors = batch.get("layout"), batch.get("chunk_embeds")
    if layout is None or not layout.num_chunks:
        return {}
    network: Any = copy.deepcopy(model).eval()
    if vectors is None:
        vectors = encode_batch(network.encoder, batch["encoder_input_ids"], batch.get("encoder_attention_mask"), network.config.pooling)
    return {"token_rms": network.token_embedding_rms(), "chunk_rms": network.project(vectors).float().square().mean().sqrt().item()}


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _result(**known: Any) -> dict[str, Any]:
    """What a run reports: `losses` before each step and `loss_after` on the first batch, `gradient_norms` of each step before
    clipping, the share of sampled weights that the first step `changed`, steps `skipped` by fp16, its `loss_scale`, and failures."""
    empty = {"loss_after": None, "changed": None, "skipped": 0, "loss_scale": None, "finding": None, "message": None, "error": None}
    return {"losses": [], "gradient_norms": []} | empty | known


def _run(model: nn.Module, batches: Sequence[Mapping[str, Any]], precision: str, *, steps: int, learning_rate: float) -> dict[str, Any]:
    """Losses, gradient norms per part, and what was not finite; an error of the device is reported, not raised."""
    with same_random({parameter.device for parameter in model.parameters()}):
        torch.manual_seed(0)
        run = _Run(model, precision, learning_rate)
        try:
            run.train(batches, steps)
        except RuntimeError as error:  # no kernel of this type, or no memory
            run.result["error"] = first_line(error)
    return run.result


class _Run:
    """Some steps of AdamW on a copy of a model."""

    def __init__(self, model: nn.Module, precision: str, learning_rate: float) -> None:
        self.precision, self.dtype = precision, AUTOCAST.get(precision)
        self.model = copy.deepcopy(model).train()
        for parameter in self.model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(WEIGHTS.get(precision, torch.float32))
            parameter.grad = None
        self.device = next(self.model.parameters()).device
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # foreach and fused are off: fused Adam computes its eps in float32, which hides what the others do in fp16
        self.optimizer = torch.optim.AdamW(self.trained, lr=learning_rate, weight_decay=0.0, foreach=False, fused=False)
        self.scale = FIRST_SCALE if precision == "fp16" else 1.0
        self.result = _result()

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The Trainer's loss of one micro-batch."""
        inputs = {key: value for key, value in batch.items() if key not in _NOT_INPUTS} | {"labels": None}
        if batch.get("segments") is not None:
            inputs |= apart(batch["segments"])
        with _autocast(self.device, self.dtype):
            logits = self.model(**inputs).logits
        return next_token_loss(logits, batch["labels"], batch.get("loss_weights"))[0]

    def train(self, batches: Sequence[Mapping[str, Any]], steps: int) -> None:
        step = 0
        while step < steps and self.result["finding"] is None:
            step += self._step(_moved(batches[step % len(batches)], self.device), step)
        if self.result["finding"] is None:
            batch = _moved(batches[0], self.device)
            with torch.no_grad():
                self.result["loss_after"] = self.loss(batch).item()
            if not math.isfinite(self.result["loss_after"]):
                self._find(batch, steps)
        if self.precision == "fp16":
            self.result["loss_scale"] = self.scale

    def _step(self, batch: Mapping[str, Any], step: int) -> bool:
        """One optimizer step; False when there was none: something is not finite, or fp16's loss scale was too high."""
        loss = self.loss(batch)
        if not math.isfinite(loss.item()):
            self._find(batch, step)
            return False
        (loss * self.scale).backward()
        norms = self._gradient_norms()
        total = math.hypot(*(norm or 0.0 for norm in norms.values()))
        if not math.isfinite(total):
            self._skip_or_find(batch, step)
            return False
        self.result["losses"].append(loss.item())
        self.result["gradient_norms"].append(norms)
        self._update(total)
        if not all(bool(parameter.isfinite().all()) for parameter in self.trained):
            self._find(batch, step + 1)
        return True

    def _skip_or_find(self, batch: Mapping[str, Any], step: int) -> None:
        self.optimizer.zero_grad()
        if self.precision != "fp16" or self.result["skipped"] == MAX_SKIPPED:
            self._find(batch, step)
            return
        self.result["skipped"] += 1
        self.scale /= 2

    def _gradient_norms(self) -> dict[str, float | None]:
        """Per part, of the gradients divided by the loss scale; None where nothing has a gradient."""
        norms: dict[str, float | None] = {}
        for part, module in self.model.named_children():
            gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
            for gradient in gradients:
                gradient.div_(self.scale)
            norms[part] = math.hypot(*(torch.linalg.vector_norm(g, dtype=torch.float32).item() for g in gradients)) if gradients else None
        return norms

    def _update(self, norm: float) -> None:
        """Clip, step, and see what share of the weights that have a gradient the first step changed."""
        for parameter in self.trained:
            if parameter.grad is not None:
                parameter.grad.mul_(min(1.0, MAX_GRAD_NORM / (norm + 1e-6)))
        before = [(p, p.detach().flatten()[:SAMPLE].clone(), p.grad.flatten()[:SAMPLE] != 0) for p in self.trained if p.grad is not None]
        self.optimizer.step()
        if self.result["changed"] is None:
            moved = sum(int(((p.detach().flatten()[:SAMPLE] != old) & asked).sum()) for p, old, asked in before)
            self.result["changed"] = moved / max(1, sum(int(asked.sum()) for _, _, asked in before))
        self.optimizer.zero_grad()

    def _find(self, batch: Mapping[str, Any], step: int) -> None:
        finding = first_non_finite(self.model, lambda: self.loss(batch), loss_scale=self.scale)
        rows = [str(row) for row in batch.get("rows") or ()]
        self.result["finding"] = {} if finding is None else asdict(finding)
        self.result["message"] = explain(finding, step=step, rows=rows, precision=self.precision)


# ── judgement ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _problems(report: dict[str, Any]) -> list[str]:
    """One sentence or two for each thing that is wrong: what, and what to try."""
    return [*_device_problems(report), *_type_problems(report), *_run_problems(report), *_vector_problems(report["vectors"]), *_text_problems(report["texts"])]


def _device_problems(report: dict[str, Any]) -> Iterator[str]:
    for what in ("bf16", "fp16", "loss scaling"):
        if report["device"][what] != "ok":
            instead = "bf16 or fp32" if report["device"]["bf16"] == "ok" else "fp32"
            yield f"{what} {report['device'][what]} (on {report['device']['name']}): train with --precision {instead}."


def _type_problems(report: dict[str, Any]) -> Iterator[str]:
    for name, dtype in WEIGHTS.items():
        counts = {part: c["trained"][type_name(dtype)] for part, c in report["weights"].items() if type_name(dtype) in c["trained"]}
        if counts:
            why = "Adam's eps of 1e-8 is 0 there" if dtype == torch.float16 else "most of Adam's steps are smaller than its rounding"
            yield (
                f"{sum(counts.values()):,} trained weights ({', '.join(counts)}) are {type_name(dtype)}, and {why}: load the model in float32 "
                f"(dtype=torch.float32, or model.float()), and let autocast compute in {name.removesuffix('-weights')}."
            )


def _run_problems(report: dict[str, Any]) -> Iterator[str]:
    runs = report["runs"]
    for name, run in runs.items():
        if run["error"] and not run["error"].startswith("does not run"):  # what the device lacks is said once
            yield f"{name}: stopped with an error ({run['error']}): try another precision, smaller batches, or --device cpu."
        if run["message"]:
            yield f"{name}: {run['message']}"
        if run["losses"] and run["loss_after"] is not None and run["loss_after"] > 1.1 * run["losses"][0] + 0.1:
            yield f"{name}: the loss of the first batch rose from {run['losses'][0]:.3f} to {run['loss_after']:.3f}: lower --learning-rate."
        if run["changed"] is not None and run["changed"] < 0.5 and run["message"] is None:
            yield f"{name}: a step changed only {run['changed']:.0%} of the weights, the others lost it to rounding: keep the weights in float32."
        exact = runs.get("fp32", run)
        if run["losses"] and exact["losses"] and abs(run["losses"][0] - exact["losses"][0]) > 0.05 * abs(exact["losses"][0]) + 0.01:
            yield f"{name}: the first loss is {run['losses'][0]:.3f}, in fp32 {exact['losses'][0]:.3f}: train with --precision fp32."
    yield from _idle_parts(report)


def _idle_parts(report: dict[str, Any]) -> Iterator[str]:
    """Trained parts without a gradient in any step of any run; the policy has its own stage."""
    norms = [step for run in report["runs"].values() for step in run["gradient_norms"]]
    for part, counts in report["weights"].items():
        if norms and counts["trained"] and part != "policy" and not any(step[part] for step in norms):
            yield f"The {part} is trained, but no gradient reaches it from these batches: check that they hold compressed chunks, and labels behind them."


def _vector_problems(vectors: Mapping[str, float]) -> Iterator[str]:
    if vectors and not 1 / MAX_RATIO <= vectors["chunk_rms"] / max(vectors["token_rms"], 1e-12) <= MAX_RATIO:
        yield (
            f"Projected chunk vectors (root mean square {vectors['chunk_rms']:.3g}) are out of scale with token embeddings ({vectors['token_rms']:.3g}): "
            "for a new model call model.projector.calibrate(model.token_embedding_rms()); a trained one has learnt its scale, lower --learning-rate."
        )


def _text_problems(texts: Mapping[str, Any]) -> Iterator[str]:
    short = texts.get("too_short", 0)
    if short:
        of = f"{short:,} of {texts['rows']:,} texts" if "rows" in texts else f"{short:,} texts"
        least = f" than {texts['min_tokens']} tokens" if "min_tokens" in texts else ""
        yield f"{of} are shorter{least or ' than a window'}, and are left out: lower --max-chunks or --chunk-size, or pass --short-documents pack."


# ── on paper ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def render(report: Mapping[str, Any]) -> str:
    """The report of `doctor` as plain text: tables, then the verdict, `ok` or a numbered list of problems."""
    device, vectors = report["device"], report["vectors"]
    lines = ["Device", *_table([[name, str(value)] for name, value in device.items()])]
    lines += ["", "Weights", *_table([["part", "trained", "frozen"], *([part, _counts(c["trained"]), _counts(c["frozen"])] for part, c in report["weights"].items())])]
    if vectors:
        ratio = vectors["chunk_rms"] / max(vectors["token_rms"], 1e-12)
        lines += ["", "Root mean square", *_table([["token embeddings", _number(vectors["token_rms"])], ["projected chunk vectors", f"{_number(vectors['chunk_rms'])} ({ratio:.2f} times)"]])]
    lines += ["", "Runs", *_table(_run_rows(report["runs"]))]
    lines += ["", "Gradient norms, first step … last", *_table(_gradient_rows(report))]
    if report["texts"]:
        lines += ["", "Texts", *_table([[str(name).replace("_", " "), _number(value)] for name, value in report["texts"].items()])]
    verdict = [f"{number}. {problem}" for number, problem in enumerate(report["problems"], 1)] or ["ok"]
    return "\n".join([*lines, "", "Verdict", *verdict])


def _run_rows(runs: Mapping[str, Any]) -> list[list[str]]:
    rows = [["precision", "losses", "first batch after", "skipped", "loss scale", "weights changed", "first not finite"]]
    for name, run in runs.items():
        finding = run["finding"]
        fault = run["error"] or ("-" if finding is None else f"{finding['what']} {finding['name'] or 'the model'}" if finding else "not found again")
        changed = "-" if run["changed"] is None else f"{run['changed']:.0%}"
        losses = " ".join(_number(loss) for loss in run["losses"]) or "-"
        rows.append([name, losses, _number(run["loss_after"]), str(run["skipped"]), _number(run["loss_scale"]), changed, fault])
    return rows


def _gradient_rows(report: Mapping[str, Any]) -> list[list[str]]:
    parts = list(report["weights"])
    rows = [["precision", *parts]]
    for name, run in report["runs"].items():
        norms = run["gradient_norms"]
        rows.append([name, *(f"{_number(norms[0][part])} … {_number(norms[-1][part])}" if norms and norms[0][part] is not None else "-" for part in parts)])
    return rows


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _counts(types: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in types.items()) or "-"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


# ── small things ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _moved(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
