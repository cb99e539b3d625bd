"""The first module that is not finite: found by hand-made faults, in every precision, without a trace left in the model."""

import math

import pytest
import torch
from conftest import mixed_mask
from torch import nn

from refrag.encoder import encoder_inputs
from refrag.layout import lay_out
from refrag.training.finite import Finding, explain, first_non_finite


class Times(nn.Module):
    """Multiplies by a number."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


class Divides(nn.Module):
    """Two layers with a division by zero between them, which belongs to neither."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.down(self.up(x) / torch.zeros(2))


def ones(*shape):
    return torch.ones(*shape)


def test_a_finite_batch_has_no_finding():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    assert first_non_finite(model, lambda: model(ones(3, 2)).sum()) is None


def test_the_module_that_overflows_is_named_with_what_went_in():
    model = nn.Sequential(Times(-3e38), Times(2.0), Times(2.0))
    found = first_non_finite(model, lambda: model(ones(1, 2)).sum())
    assert found == Finding("forward", "1", "Times", "float32", input_max=torch.tensor(3e38).item())


def test_what_arises_between_two_layers_belongs_to_the_module_around_them():
    model = nn.Sequential(nn.Linear(2, 2), Divides())
    found = first_non_finite(model, lambda: model(ones(1, 2)).sum())
    assert (found.what, found.name, found.kind, found.before) == ("forward", "1", "Divides", "1.down")


def test_what_the_whole_model_adds_is_its_own():
    model = Divides()
    found = first_non_finite(model, lambda: model(ones(1, 2)).sum())
    assert (found.name, found.kind, found.before) == ("", "Divides", "down")


def test_a_weight_comes_before_its_output_and_the_others_are_counted():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2).half())
    with torch.no_grad():
        model[1].bias[1] = math.nan
        model[2].weight[0, 0] = math.inf
    assert first_non_finite(model, lambda: pytest.fail("weights are enough")) == Finding("weight", "1.bias", "Linear", "float32", count=2)


def test_the_loss_alone():
    model = nn.Linear(2, 1)
    found = first_non_finite(model, lambda: model(ones(1, 2)).sum() / 0)
    assert (found.what, found.name) == ("loss", "")


def test_the_first_gradient_in_backward_order():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3), nn.Linear(3, 1))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)

    def run():  # the slope of a square root at 0 is infinite
        return model[2](model[1](model[0](torch.full((1, 2), 5.0))).sqrt()).sum()

    found = first_non_finite(model, run)
    assert (found.what, found.kind) == ("gradient", "Linear") and found.name in ("1.weight", "1.bias")
    assert found.input_max == pytest.approx(model[0](torch.full((1, 2), 5.0)).abs().max().item())


def test_an_infinite_attention_mask_is_no_fault():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = nn.Linear(2, 2)

        def forward(self, x, attention_mask=None):
            return self.scores(x) + attention_mask.clamp(min=-100)

    model, mask = Masked(), torch.tensor([0.0, -math.inf])
    assert first_non_finite(model, lambda: model(ones(1, 2), mask).sum()) is None
    with torch.no_grad():
        model.scores.weight.fill_(3e38)
    found = first_non_finite(model, lambda: model(ones(1, 2) * 2, mask).sum())
    assert (found.name, found.input_max) == ("scores", 2.0)


def test_an_error_after_the_finding_does_not_hide_it_and_one_before_is_raised():
    model = nn.Sequential(Times(math.inf), nn.Linear(2, 2))

    def late():
        model(ones(1, 2))
        raise RuntimeError("late")

    def early():
        raise RuntimeError("early")

    assert first_non_finite(model, late).name == "0"
    with pytest.raises(RuntimeError, match="early"):
        first_non_finite(model, early)


@pytest.mark.parametrize("fault", [None, "forward", "raises"])
def test_the_model_and_the_random_state_are_as_before(fault):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5), Times(math.inf if fault == "forward" else 1.0))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    gradients = [(p.grad, p.grad.clone()) for p in model.parameters()]
    state, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()

    def run():
        loss = model(torch.randn(4, 2)).sum()
        if fault == "raises":
            raise RuntimeError
        return loss

    if fault == "raises":
        with pytest.raises(RuntimeError):
            first_non_finite(model, run)
    else:
        assert (first_non_finite(model, run) is not None) == (fault == "forward")
    for parameter, (gradient, value) in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is gradient and torch.equal(gradient, value)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())


def test_without_gradients_only_the_forward_pass_is_looked_at():
    model = nn.Linear(2, 1)
    with torch.no_grad():
        assert first_non_finite(model, lambda: model(ones(1, 2)).sum()) is None


def test_a_compiled_model_has_the_names_of_the_plain_one():
    model = torch.compile(nn.Sequential(nn.Linear(2, 2), nn.Sequential(Times(math.inf))), backend="eager")
    model(ones(1, 2))
    assert first_non_finite(model, lambda: model(ones(1, 2)).sum()).name == "1.0"


# ── a RefragModel ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def batch(prompts, make_model):
    """(a new model, what its forward takes)."""
    model = make_model()
    layout = lay_out(prompts, [mixed_mask(p) for p in prompts], completions=[[5, 6, 7], [8, 9]])
    ids, mask = encoder_inputs(model.encoder, model.encoder_tokenizer, [text for p in prompts for text in p.chunk_texts()])
    return model, {"layout": layout, "encoder_input_ids": ids, "encoder_attention_mask": mask}


def runs(model, inputs, dtype=None):
    def run():
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            return model(**inputs).loss

    return run


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_sound_model_is_finite_in_every_precision(batch, dtype):
    assert first_non_finite(batch[0], runs(*batch, dtype)) is None


def test_a_projector_of_infinite_scale_is_found_in_the_projector(batch):
    model, inputs = batch
    with torch.no_grad():
        model.projector.log_scale.fill_(100.0)
    found = first_non_finite(model, runs(model, inputs))
    assert (found.what, found.name, found.kind) == ("forward", "projector", "Projector")


def test_a_vector_that_arrives_broken_is_no_layers_fault(batch):
    model, inputs = batch
    vectors = torch.full((inputs["layout"].num_chunks, 24), math.nan)
    found = first_non_finite(model, lambda: model(layout=inputs["layout"], chunk_embeds=vectors).loss)
    assert (found.what, found.name, found.kind) == ("input", "", "RefragModel")


def overflow_in_fp16(model):
    with torch.no_grad():
        model.decoder.model.layers[1].mlp.up_proj.weight.fill_(400.0)
        model.decoder.model.layers[1].mlp.gate_proj.weight.fill_(400.0)


def test_fp16_overflows_where_fp32_and_bf16_do_not(batch):
    model, inputs = batch
    overflow_in_fp16(model)
    assert first_non_finite(model, runs(model, inputs)) is None
    assert first_non_finite(model, runs(model, inputs, torch.bfloat16)) is None
    found = first_non_finite(model, runs(model, inputs, torch.float16))
    assert (found.what, found.name, found.before, found.dtype) == ("forward", "decoder.model.layers.1.mlp", "decoder.model.layers.1.mlp.down_proj", "float16")


def test_a_loss_scale_that_is_too_large_is_found_in_the_backward_pass(batch):
    model, inputs = batch
    run = runs(model, inputs, torch.float16)
    assert first_non_finite(model, run, loss_scale=1024.0) is None
    found = first_non_finite(model, run, loss_scale=2.0**40)
    assert found.what == "gradient" and found.name.startswith("decoder.")


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(batch, reentrant):
    model, inputs = batch
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert first_non_finite(model, runs(model, inputs)) is None
    overflow_in_fp16(model)
    assert first_non_finite(model, runs(model, inputs, torch.float16)).name == "decoder.model.layers.1.mlp"


# ── words ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("finding", "precision", "said"),
    [
        (
            Finding("forward", "decoder.mlp", "Mlp", "float16", 61234.0, "decoder.mlp.down"),
            "fp16",
            "The forward pass was not finite at step 7 on rows a, b in fp16, first in decoder.mlp "
            "(Mlp, float16, largest input 6.12e+04), before decoder.mlp.down. fp16 ends at 65504: train with --precision bf16 or fp32, or lower --learning-rate.",
        ),
        (
            Finding("forward", "", "RefragModel", "float32"),
            "no",
            "The forward pass was not finite at step 7 on rows a, b in fp32, first in the model itself (RefragModel, float32). Lower --learning-rate, or make --warmup longer.",
        ),
        (
            Finding("gradient", "projector.up.weight", "Linear", "float32", 2.0),
            "bf16",
            "The loss was finite at step 7 on rows a, b in bf16, but not the gradients, in the backward pass first that of projector.up.weight "
            "(Linear, float32, largest input 2). Lower --learning-rate, or train with --precision fp32.",
        ),
        (
            Finding("weight", "encoder.a", "Embedding", "float32", count=3),
            "fp32",
            "The weights were not finite before the forward pass at step 7 on rows a, b in fp32, encoder.a (Embedding, float32) and 2 other parameters: "
            "an optimizer step made them so. Start again from the last good checkpoint, with a lower --learning-rate or a longer --warmup.",
        ),
        (
            Finding("loss", "", "RefragModel", "float32"),
            "fp32",
            "All outputs were finite at step 7 on rows a, b in fp32, the loss over them was not: look at its labels and weights. If they are right, lower --learning-rate.",
        ),
        (
            Finding("input", "", "RefragModel", "float32"),
            "fp32",
            "What was given to the model itself (RefragModel, float32) was not finite at step 7 on rows a, b in fp32: look at the rows, and at chunk vectors "
            "stored for them. If they are right, lower --learning-rate.",
        ),
        (
            None,
            "fp32",
            "Something was not finite at step 7 on rows a, b in fp32, but the same batch run again was: chance (dropout) or the device. "
            "Lower --learning-rate, or make --warmup longer.",
        ),
    ],
)
def test_what_is_said(finding, precision, said):
    assert explain(finding, step=7, rows=["a", "b"], precision=precision) == said


def test_fp16_weights_are_told_about_adam():
    said = explain(Finding("weight", "a", "Linear", "float16"), step=1, rows=[], precision="no")
    assert "at step 1 in fp32" in said and "eps of 1e-8 is 0 in fp16" in said and "--precision bf16" in said


def test_many_rows_are_counted():
    assert "on rows 0, 1, 2, 3, 4 and 3 more in" in explain(None, step=1, rows=list("01234567"), precision="fp32")
