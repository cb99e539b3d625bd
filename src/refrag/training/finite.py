"""Where a loss or a gradient stopped being finite: the first module or parameter, found by running one batch again with hooks."""

import inspect
import math
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

SHOWN_ROWS = 5
"""Rows that `explain` names; of more it says how many."""

_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class Finding:
    """What is not finite, and where that began."""

    what: Literal["weight", "input", "forward", "loss", "gradient"]
    """A parameter itself; what was given to the model; a module's output from finite inputs; the loss over finite outputs; the gradient of a parameter."""
    name: str
    """Qualified name of the module or the parameter; empty for the whole model."""
    kind: str
    """The module's class; for a parameter, that of the module that holds it."""
    dtype: str
    """Type of the values, such as `float16`."""
    input_max: float | None = None
    """Largest absolute value that went into the module, attention masks aside; None for weights, and where nothing did."""
    before: str | None = None
    """The inner module that got values that are not finite: they arose in `name` itself, before it."""
    count: int = 1
    """Weights: how many of the parameters are not finite."""


def first_non_finite(model: nn.Module, run: Callable[[], Float[Tensor, ""]], *, loss_scale: float = 1.0) -> Finding | None:
    """The first thing that is not finite when `run` does a forward pass of `model` again, or None.

    `run` returns the loss (autocast inside it), which is multiplied by `loss_scale` for the backward pass. Looked at in this order:
    weights; outputs of modules in the order of execution, where the inputs were finite; the loss; gradients of parameters in
    the order of the backward pass, which is left out where the loss has none. Weights, gradients, buffers, hooks and random state
    are as before afterwards. An error of `run` is raised, unless something was found before it.
    One process of DistributedDataParallel may call this alone. With sharded parameters all processes must, and all get the first
    one's finding.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    _reshard(inner)
    finding = _agreed(inner, _weights(inner))
    if finding is not None:
        return finding
    modules, parameters = _Modules(inner), _Gradients(inner)
    with _unchanged(inner), _alone(model), torch.compiler.set_stance("force_eager"):
        loss = None
        try:
            with modules.watched():
                loss = run()
        except Exception:
            if modules.finding is None:
                raise
        finding = _agreed(inner, modules.finding or modules.loss_finding(loss))
        if finding is None and loss is not None and loss.requires_grad:
            with parameters.watched():
                parameters.backward(loss.float() * loss_scale, alone=inner is not model)
            finding = _agreed(inner, parameters.finding(modules.input_max))
    return finding


def explain(finding: Finding | None, *, step: int, rows: Sequence[str], precision: str) -> str:
    """What happened, where it first appeared, and what to try, in two sentences.

    `precision`: fp32 (or no), bf16, fp16 (both by autocast), or fp16-weights and bf16-weights for weights of that type.
    """
    names = ", ".join(rows[:SHOWN_ROWS]) + (f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else "")
    precision = "fp32" if precision == "no" else precision
    when = f"at step {step}" + (f" on rows {names}" if rows else "") + f" in {precision}"
    return f"{_where(finding, when)} {_try(finding, precision)}"


def type_name(dtype: torch.dtype) -> str:
    """`float16` and the like."""
    return str(dtype).removeprefix("torch.")


# ── words ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _where(finding: Finding | None, when: str) -> str:
    if finding is None:
        return f"Something was not finite {when}, but the same batch run again was: chance (dropout) or the device."
    reached = "" if finding.input_max is None else f", largest input {finding.input_max:.3g}"
    place = f"{finding.name or 'the model itself'} ({finding.kind}, {finding.dtype}{reached})"
    if finding.what == "weight":
        others = f" and {finding.count - 1} other parameters" if finding.count > 1 else ""
        return f"The weights were not finite before the forward pass {when}, {place}{others}: an optimizer step made them so."
    if finding.what == "input":
        return f"What was given to {place} was not finite {when}: look at the rows, and at chunk vectors stored for them."
    if finding.what == "loss":
        return f"All outputs were finite {when}, the loss over them was not: look at its labels and weights."
    if finding.what == "gradient":
        return f"The loss was finite {when}, but not the gradients, in the backward pass first that of {place}."
    inside = f", before {finding.before}" if finding.before else ""
    return f"The forward pass was not finite {when}, first in {place}{inside}."


def _try(finding: Finding | None, precision: str) -> str:
    if precision == "fp16-weights" or (finding is not None and finding.what == "weight" and finding.dtype == "float16"):
        return (
            "Adam's eps of 1e-8 is 0 in fp16, so it divides by 0: keep the weights in fp32 (model.float()) and train with "
            "--precision bf16, or fp16, which is then autocast with loss scaling."
        )
    if finding is not None and finding.what == "weight":
        return "Start again from the last good checkpoint, with a lower --learning-rate or a longer --warmup."
    if finding is not None and finding.what in ("loss", "input"):
        return "If they are right, lower --learning-rate."
    if precision == "fp16":
        return "fp16 ends at 65504: train with --precision bf16 or fp32, or lower --learning-rate."
    if precision.startswith("bf16"):
        return "Lower --learning-rate, or train with --precision fp32."
    return "Lower --learning-rate, or make --warmup longer."


# ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _tensors(value: Any, name: str = "") -> Iterator[Tensor]:
    """Floating-point tensors in nested arguments; masks, which may hold -inf, aside."""
    if "mask" in name:
        return
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel() and not value.is_meta:
            yield value.detach()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, str(key))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _largest(value: Any) -> float:
    """Largest absolute value in nested tensors: NaN or infinite where one is; 0.0 without any."""
    largest = 0.0
    for tensor in _tensors(value):
        local = getattr(tensor, "to_local", tensor.detach)()  # of a DTensor, this process's shard
        found = torch.linalg.vector_norm(local, math.inf).item() if local.numel() else 0.0
        if not math.isfinite(found):
            return found
        largest = max(largest, found)
    return largest


def _name(name: str) -> str:
    """Without what torch.compile and other wrappers put between."""
    return _WRAPPERS.sub("", f"{name}.").removesuffix(".")


def _weights(model: nn.Module) -> Finding | None:
    bad = [(name, weight) for name, weight in model.named_parameters() if not math.isfinite(_largest(weight))]
    if not bad:
        return None
    name, weight = bad[0]
    return Finding("weight", _name(name), _holder(model, name), type_name(weight.dtype), count=len(bad))


def _agreed(model: nn.Module, finding: Finding | None) -> Finding | None:
    """Processes that share weights stop together, else the others would wait for this one in the backward pass."""
    if not any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        return finding
    found: list[Finding | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, finding)
    return next((other for other in found if other is not None), None)


def _holder(model: nn.Module, parameter: str) -> str:
    return type(model.get_submodule(parameter.rpartition(".")[0])).__name__


class _Modules:
    """The outputs of all modules in one forward pass, in the order in which modules finish."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.finding: Finding | None = None
        self.inputs: dict[nn.Module, float] = {}
        self.reached: tuple[str, str] | None = None
        """Name and class of the first module that got values that are not finite."""

    def input_max(self, module: nn.Module) -> float | None:
        return self.inputs.get(module)

    @contextmanager
    def watched(self) -> Generator[None]:
        handles = []
        try:
            for name, module in self.model.named_modules():
                handles.append(module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True, prepend=True))
                handles.append(module.register_forward_hook(partial(self._after, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.finding is None:
            self.inputs[module] = _largest(_arguments(module, args, kwargs))
            if self.reached is None and not math.isfinite(self.inputs[module]):
                self.reached = _name(name), type(module).__name__

    def _after(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self.finding is not None or not math.isfinite(into := self.inputs.get(module, 0.0)):
            return
        bad = next((tensor for tensor in _tensors(output) if not math.isfinite(_largest(tensor))), None)
        if bad is not None:
            inside = self.reached[0] if self.reached and self.reached[0].startswith(_name(name)) else None
            self.finding = Finding("forward", _name(name), type(module).__name__, type_name(bad.dtype), into or None, inside)


    def loss_finding(self, loss: Tensor | None) -> Finding | None:
        """Where every output was finite that could be: the loss, or what the model was given."""
        if loss is None or math.isfinite(_largest(loss)):
            return None
        if self.reached is not None:
            return Finding("input", *self.reached, type_name(loss.dtype))
        return Finding("loss", "", type(self.model).__name__, type_name(loss.dtype))


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, so that masks are told apart."""
    try:
        return inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return {"args": args, **kwargs}


class _Gradients:
    """The gradients of all parameters in one backward pass, in the order in which they are done."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.first: str | None = None

    @contextmanager
    def watched(self) -> Generator[None]:
        handles = []
        try:
            for name, parameter in self.parameters:
                handles.append(parameter.register_hook(partial(self._look, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def backward(self, loss: Tensor, *, alone: bool) -> None:
        if alone:  # leaves out the hooks with which DistributedDataParallel waits for the other processes
            torch.autograd.grad(loss, [parameter for _, parameter in self.parameters], allow_unused=True)
        else:
            loss.backward()

    def _look(self, name: str, gradient: Tensor) -> None:
        if self.first is None and not math.isfinite(_largest(gradient)):
            self.first = name

    def finding(self, input_max: Callable[[nn.Module], float | None]) -> Finding | None:
        """Sharded parameters call no hook: they are looked at afterwards, the last first."""
        late = (name for name, p in reversed(self.parameters) if p.grad is not None and not math.isfinite(_largest(p.grad)))
        name = self.first or next(late, None)
        if name is None:
            return None
        parameter, module = dict(self.parameters)[name], self.model.get_submodule(name.rpartition(".")[0])
        return Finding("gradient", _name(name), type(module).__name__, type_name(parameter.dtype), input_max(module))


# ── leaving no trace ─────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _unchanged(model: nn.Module) -> Generator[None]:
    """Gradients, buffers and random state as before."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(m, name, b, b.detach().clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False) if not b.is_meta]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with same_random({tensor.device for tensor in model.parameters()}):
            yield
    finally:
        _reshard(model)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            with torch.no_grad():
                buffer.copy_(value)


def _reshard(model: nn.Module) -> None:
    """Let go of weights that a forward pass gathered for a backward pass that does not come."""
    for module in model.modules():
        reshard: Any = getattr(module, "reshard", None)
        if reshard is not None:
            reshard()


@contextmanager
def same_random(devices: set[torch.device]) -> Generator[None]:
    """The random state of the CPU and of `devices` is afterwards what it was."""
    kept: list[tuple[Any, tuple[Any, ...], Tensor]] = []
    for device in devices:
        if device.type not in ("cpu", "meta"):
            source: Any = torch.get_device_module(device)
            where = () if device.type == "mps" else (device,)
            kept.append((source, where, source.get_rng_state(*where)))
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for source, where, state in kept:
                source.set_rng_state(state, *where)


@contextmanager
def _alone(model: nn.Module) -> Generator[None]:
    """One process of DistributedDataParallel runs without waiting for the others."""
    if not isinstance(model, DistributedDataParallel):
        yield
        return
    synced = model.require_forward_param_sync
    model.require_forward_param_sync = False
    try:
        with model.no_sync():
            yield
    finally:
        model.require_forward_param_sync = synced
