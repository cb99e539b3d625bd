"""The doctor: it finds the prototype's failure by itself, leaves the model alone, and says what is wrong and what to do."""

import json
import math

import pytest
import torch
from conftest import mixed_mask
from torch import nn

from refrag.encoder import encoder_inputs
from refrag.errors import InputError
from refrag.layout import lay_out
from refrag.training import doctor as module
from refrag.training.doctor import doctor, probe, render, vector_scales
from refrag.training.trainer import apart, next_token_loss

ABLE = {"name": "cpu", "fastest": "float32", "bf16": "ok", "fp16": "ok", "loss scaling": "ok"}


@pytest.fixture
def model(make_model):
    return make_model(policy={"kind": "none"}).requires_grad_(True)


@pytest.fixture
def batches(model, prompts):
    """Two micro-batches: one chunk of three expanded, and none."""

    def batch(masks, rows):
        layout = lay_out(prompts, masks, completions=[[5, 6, 7], [8, 9]])
        ids, mask = encoder_inputs(model.encoder, model.encoder_tokenizer, [text for p in prompts for text in p.chunk_texts()])
        return {"layout": layout, "encoder_input_ids": ids, "encoder_attention_mask": mask, "labels": layout.labels, "name": "cpt", "rows": rows}

    return [batch([mixed_mask(p) for p in prompts], ["a", "b"]), batch([[False] * len(p.chunks) for p in prompts], ["c", "d"])]


def inputs(batch):
    return {key: batch[key] for key in ("layout", "encoder_input_ids", "encoder_attention_mask")} | {"labels": None}


def loss_of(model, batch):
    return next_token_loss(model(**inputs(batch)).logits, batch["labels"], None)[0]


def finite(value) -> bool:
    return math.isfinite(value)


# ── the prototype's failure ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("learning_rate", [5e-5, 1e-5])
def test_pure_fp16_with_adam_is_not_finite_after_the_first_step(model, batches, learning_rate):
    model.half().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    first = loss_of(model, batches[0])
    first.backward()
    assert finite(first.item()) and all(bool(p.grad.isfinite().all()) for p in model.parameters())
    optimizer.step()
    assert not finite(loss_of(model, batches[0]).item())


@pytest.mark.parametrize("learning_rate", [5e-5, 1e-5])
def test_the_doctor_finds_it_by_itself_in_a_model_of_fp16_weights(model, batches, learning_rate):
    report = doctor(model.half(), batches, learning_rate=learning_rate)
    run = report["runs"]["fp16-weights"]
    assert len(run["losses"]) == 1 and finite(run["losses"][0]) and run["loss_after"] is None
    assert all(finite(norm) for norm in run["gradient_norms"][0].values())
    assert (run["finding"]["what"], run["finding"]["dtype"]) == ("weight", "float16")
    assert run["finding"]["name"] == next(iter(model.named_parameters()))[0]
    types, failure = report["problems"]
    number = sum(p.numel() for p in model.parameters())
    assert types == (
        f"{number:,} trained weights (encoder, decoder, projector) are float16, and Adam's eps of 1e-8 is 0 there: load the model in float32 "
        "(dtype=torch.float32, or model.float()), and let autocast compute in fp16."
    )
    assert failure.startswith("fp16-weights: The weights were not finite before the forward pass at step 1 on rows a, b in fp16-weights, encoder.")
    assert "keep the weights in fp32 (model.float())" in failure


def test_our_fp16_stays_finite_and_learns_where_the_prototypes_does_not(model, batches):
    runs = doctor(model, batches, steps=10, learning_rate=1e-3, precisions=("fp32", "fp16", "fp16-weights"))["runs"]
    assert runs["fp16-weights"]["finding"] is not None and runs["fp16"]["finding"] is None
    assert len(runs["fp16"]["losses"]) == 10 and all(map(finite, runs["fp16"]["losses"]))
    assert runs["fp16"]["losses"] == pytest.approx(runs["fp32"]["losses"], abs=0.02)
    assert runs["fp16"]["loss_after"] < runs["fp16"]["losses"][0] - 0.05


def test_bf16_weights_lose_steps_to_rounding(model, batches):
    report = doctor(model.bfloat16(), batches, steps=1, learning_rate=1e-5, precisions=("fp32",))
    run = report["runs"]["bf16-weights"]
    assert run["finding"] is None and run["changed"] < 0.5 and report["runs"]["fp32"]["changed"] > 0.99
    assert "are bfloat16, and most of Adam's steps are smaller than its rounding" in report["problems"][0]
    assert report["problems"][1] == f"bf16-weights: a step changed only {run['changed']:.0%} of the weights, the others lost it to rounding: keep the weights in float32."


# ── a sound model ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_sound_model_is_ok_in_every_precision(model, batches):
    report = doctor(model, batches)
    assert report["problems"] == []
    assert set(report["runs"]) == {"fp32", "bf16", "fp16"}
    for run in report["runs"].values():
        assert len(run["losses"]) == len(run["gradient_norms"]) == 3
        assert run["loss_after"] < run["losses"][0]
        assert (run["skipped"], run["finding"], run["message"], run["error"]) == (0, None, None, None)
    assert report["runs"]["fp16"]["loss_scale"] == 65536 and report["runs"]["bf16"]["loss_scale"] is None
    assert json.loads(json.dumps(report)) == report


def test_the_model_stays_as_it_is(model, batches):
    model.decoder.train()  # of a model that is in eval mode
    before, modes, random = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()], torch.get_rng_state()
    doctor(model, batches, learning_rate=0.1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_fp32_is_plain_training(make_model, batches):
    dropout = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    one, other = (make_model(policy={"kind": "none"}).requires_grad_(True) for _ in range(2))
    for net in (one, other):
        for layer in net.encoder.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        for name, value in dropout.items():
            setattr(net.encoder.config, name, value)
        for layer in net.encoder.encoder.layer:
            layer.attention.self.dropout.p = 0.0
    run = doctor(one, batches, steps=4, learning_rate=1e-2, precisions=("fp32",))["runs"]["fp32"]
    other.train()
    optimizer, losses, norms = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0), [], []
    for step in range(4):
        loss = loss_of(other, batches[step % 2])
        loss.backward()
        losses.append(loss.item())
        norms.append({part: torch.cat([p.grad.flatten() for p in net.parameters()]).norm().item() for part, net in other.named_children()})
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert run["losses"] == pytest.approx(losses, rel=1e-5)
    assert run["loss_after"] == pytest.approx(loss_of(other, batches[0]).item(), rel=1e-5)
    for mine, plain in zip(run["gradient_norms"], norms, strict=True):
        assert mine == pytest.approx(plain, rel=1e-4)


def test_weights_segments_and_answers_of_a_batch_count_as_in_training(make_decoder):
    decoder = make_decoder("llama").requires_grad_(True)
    ids, weights = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0.0, 0.0, 1.0, 2.0, 0.5]])
    segments = torch.tensor([[0, 0, 1, 1, 2]])
    batch = {"input_ids": ids, "labels": ids, "loss_weights": weights, "answers": torch.zeros_like(ids), "segments": segments, "name": "questions"}
    report = doctor(decoder, [batch], steps=1, precisions=("fp32",))
    expected = next_token_loss(decoder(input_ids=ids, **apart(segments)).logits, ids, weights)[0].item()
    assert report["runs"]["fp32"]["losses"] == pytest.approx([expected], rel=1e-5)
    assert report["vectors"] == {} and set(report["weights"]) == {"model", "lm_head"}


def test_scales_by_hand(model, batches):
    scales = vector_scales(model, batches[0])
    assert scales["token_rms"] == pytest.approx(model.decoder.model.embed_tokens.weight.square().mean().sqrt().item())
    vectors = torch.randn(batches[0]["layout"].num_chunks, 24)
    with torch.no_grad():
        model.projector.down.weight.zero_()
        model.projector.down.bias.fill_(-0.5)
        model.projector.log_scale.fill_(math.log(6.0))
    assert vector_scales(model, {"layout": batches[0]["layout"], "chunk_embeds": vectors})["chunk_rms"] == pytest.approx(3.0)


# ── problems ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_vectors_out_of_scale(model, batches):
    with torch.no_grad():
        model.projector.log_scale += 4.0
    problems = doctor(model, batches, steps=1, precisions=("fp32",))["problems"]
    assert len(problems) == 1 and "are out of scale with token embeddings (0.02)" in problems[0] and "model.projector.calibrate(" in problems[0]


def test_fp16_lowers_its_scale_until_gradients_fit(model, batches):
    with torch.no_grad():
        model.decoder.lm_head.weight *= 3e3
    run = doctor(model, batches, precisions=("fp16",))["runs"]["fp16"]
    assert 0 < run["skipped"] <= 16 and run["loss_scale"] == 65536 / 2 ** run["skipped"]
    assert len(run["losses"]) == 3 and run["finding"] is None


def infinite_slope(layer, args, output):
    return output + (output - output.detach()).abs().sqrt()


@pytest.mark.parametrize(("precision", "skipped"), [("fp32", 0), ("fp16", 16)])
def test_a_gradient_that_no_scale_mends(model, batches, precision, skipped):
    model.decoder.model.layers[1].register_forward_hook(infinite_slope)
    report = doctor(model, batches, precisions=(precision,))
    run = report["runs"][precision]
    assert (run["skipped"], run["losses"], run["finding"]["what"]) == (skipped, [], "gradient")
    assert run["finding"]["name"].startswith("decoder.model.layers.1.")
    assert report["problems"][0].startswith(f"{precision}: The loss was finite at step 0 on rows a, b in {precision}, but not the gradients")


def test_the_module_that_overflows_in_fp16_only(model, batches):
    with torch.no_grad():
        for layer in (model.decoder.model.layers[1].mlp.up_proj, model.decoder.model.layers[1].mlp.gate_proj):
            layer.weight.fill_(400.0)
    report = doctor(model, batches, steps=1)
    assert [name for name, run in report["runs"].items() if run["finding"]] == ["fp16"]
    assert report["runs"]["fp16"]["finding"]["name"] == "decoder.model.layers.1.mlp"
    said = next(problem for problem in report["problems"] if problem.startswith("fp16: "))
    assert "first in decoder.model.layers.1.mlp (LlamaMLP, float16" in said and "train with --precision bf16 or fp32" in said


def test_vectors_that_are_not_finite(model, batches):
    batch = {key: batches[0][key] for key in ("layout", "labels", "rows")}
    vectors = torch.randn(batch["layout"].num_chunks, 24)
    vectors[0] = math.nan  # of an expanded chunk, and yet no number
    vectors[1] = math.nan
    run = doctor(model, [batch | {"chunk_embeds": vectors}], precisions=("fp32",))["runs"]["fp32"]
    assert run["finding"]["what"] == "input" and "on rows a, b" in run["message"]


def test_parts_that_no_gradient_reaches(make_model, prompts, batches):
    model = make_model().requires_grad_(True)  # with a policy, which has its own stage
    layout = lay_out(prompts, [[True] * len(p.chunks) for p in prompts], completions=[[5, 6, 7], [8, 9]])
    report = doctor(model, [batches[0] | {"layout": layout, "labels": layout.labels}], steps=1, precisions=("fp32",))
    assert [problem.split(",")[0] for problem in report["problems"]] == ["The encoder is trained", "The projector is trained"]
    model.encoder.requires_grad_(False)
    model.projector.requires_grad_(False)
    report = doctor(model, [batches[0] | {"layout": layout, "labels": layout.labels}], steps=1, precisions=("fp32",))
    assert report["problems"] == [] and report["runs"]["fp32"]["gradient_norms"][0]["encoder"] is None


def test_a_loss_that_rises(model, batches):
    report = doctor(model, batches[:1], learning_rate=1.0, precisions=("fp32",))
    assert len(report["problems"]) == 1 and report["problems"][0].startswith("fp32: the loss of the first batch rose from 6.0")
    assert report["problems"][0].endswith("lower --learning-rate.")


def test_short_texts(model, batches):
    texts = {"rows": 1200, "too_short": 1000, "min_tokens": 64, "median_tokens": 12.5}
    report = doctor(model, batches, steps=1, precisions=("fp32",), texts=texts)
    assert report["texts"] == texts
    assert report["problems"] == [
        "1,000 of 1,200 texts are shorter than 64 tokens, and are left out: lower --max-chunks or --chunk-size, or pass --short-documents pack."
    ]
    report = doctor(model, batches, steps=1, precisions=("fp32",), texts={"too_short": 2})
    assert report["problems"][0].startswith("2 texts are shorter than a window, and are left out")


# ── devices ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_precision_without_kernels_is_not_tried(model, batches, monkeypatch):
    real = module._probe_layers

    def without_bf16(device, dtype):
        if dtype == torch.bfloat16:
            raise TypeError("BFloat16 is not supported here.\nmore")
        return real(device, dtype)

    monkeypatch.setattr(module, "_probe_layers", without_bf16)
    report = doctor(model, batches, steps=1)
    assert report["runs"]["bf16"]["error"] == report["device"]["bf16"] == "does not run: BFloat16 is not supported here"
    assert report["runs"]["bf16"]["losses"] == [] and len(report["runs"]["fp16"]["losses"]) == 1
    assert report["problems"] == ["bf16 does not run: BFloat16 is not supported here (on cpu): train with --precision fp32."]


@pytest.mark.parametrize("wrong", [(1.0, 1.0), (math.nan, 1.0), (None, math.inf)])
def test_a_device_that_computes_wrong_values_is_found(monkeypatch, wrong):
    real = module._probe_layers

    def wrong_in_fp16(device, dtype):
        value, gradient = real(device, dtype)
        return (value if wrong[0] is None else wrong[0], wrong[1]) if dtype == torch.float16 else (value, gradient)

    monkeypatch.setattr(module, "_probe_layers", wrong_in_fp16)
    found = probe(torch.device("cpu"))
    assert found["fp16"].startswith("gives wrong values: ") and found["bf16"] == "ok"


def test_a_device_without_loss_scaling_is_found(monkeypatch):
    def refuse(device):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(torch.amp, "GradScaler", refuse)
    assert probe(torch.device("cpu"))["loss scaling"] == "does not run: no such kernel"


def fails_in_bf16(layer, args):
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16:
        raise RuntimeError("out of memory")


def test_an_error_of_one_precision_does_not_stop_the_others(model, batches):
    model.decoder.register_forward_pre_hook(fails_in_bf16)
    report = doctor(model, batches, steps=1)
    assert report["runs"]["bf16"]["error"] == "out of memory" and len(report["runs"]["fp16"]["losses"]) == 1
    assert report["problems"] == ["bf16: stopped with an error (out of memory): try another precision, smaller batches, or --device cpu."]


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batches": []}, "The doctor needs one batch or more, none was given: check --data, whose texts may all be too short."),
        ({"steps": 0}, "steps must be 1 or more, was 0: try 3."),
        ({"precisions": ("fp32", "fp8")}, "precisions must be of fp32, bf16, fp16, fp16-weights, bf16-weights, were fp32, fp8."),
        ({"precisions": ()}, "precisions must be of fp32, bf16, fp16, fp16-weights, bf16-weights, were none."),
    ],
)
def test_bad_input(model, batches, change, said):
    with pytest.raises(InputError) as error:
        doctor(**({"model": model, "batches": batches} | change))
    assert str(error.value) == said


def test_a_frozen_model_is_refused(model, batches):
    with pytest.raises(InputError, match="every part of the model is frozen"):
        doctor(model.requires_grad_(False), batches)


# ── on paper ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def report_of(runs, **others):
    empty = {"losses": [], "gradient_norms": [], "loss_after": None, "changed": None, "skipped": 0, "loss_scale": None, "finding": None, "message": None, "error": None}
    weights = {"encoder": {"trained": {}, "frozen": {"float32": 1200}}, "projector": {"trained": {"float32": 30}, "frozen": {}}}
    whole = {"device": ABLE, "weights": weights, "vectors": {}, "texts": {}, "problems": []}
    return whole | {"runs": {name: empty | run for name, run in runs.items()}} | others


def test_the_report_on_paper():
    runs = {
        "fp32": {"losses": [4.0, 3.5], "loss_after": 3.25, "changed": 1.0, "gradient_norms": [{"encoder": None, "projector": 2.0}, {"encoder": None, "projector": 1.5}]},
        "fp16": {"losses": [4.0], "changed": 0.5, "loss_scale": 32768.0, "skipped": 1, "finding": {"what": "forward", "name": "projector"}, "message": "…"},
        "bf16": {"error": "does not run: no kernel"},
    }
    texts = {"rows": 12000, "too_short": 3}
    text = render(report_of(runs, vectors={"token_rms": 0.02, "chunk_rms": 0.03}, texts=texts, problems=["This.", "That."]))
    assert text.splitlines() == [
        "Device",
        "  name          cpu",
        "  fastest       float32",
        "  bf16          ok",
        "  fp16          ok",
        "  loss scaling  ok",
        "",
        "Weights",
        "  part       trained     frozen",
        "  encoder    -           1,200 float32",
        "  projector  30 float32  -",
        "",
        "Root mean square",
        "  token embeddings         0.02",
        "  projected chunk vectors  0.03 (1.50 times)",
        "",
        "Runs",
        "  precision  losses  first batch after  skipped  loss scale  weights changed  first not finite",
        "  fp32       4 3.5   3.25               0        -           100%             -",
        "  fp16       4       -                  1        3.277e+04   50%              forward projector",
        "  bf16       -       -                  0        -           -                does not run: no kernel",
        "",
        "Gradient norms, first step … last",
        "  precision  encoder  projector",
        "  fp32       -        2 … 1.5",
        "  fp16       -        -",
        "  bf16       -        -",
        "",
        "Texts",
        "  rows       12,000",
        "  too short  3",
        "",
        "Verdict",
        "1. This.",
        "2. That.",
    ]


def test_without_problems_the_verdict_is_ok():
    assert render(report_of({"fp32": {"losses": [1.0]}})).endswith("\n\nVerdict\nok")


def test_a_whole_report_can_be_rendered(model, batches):
    text = render(doctor(model.half(), batches, steps=1))
    assert "fp16-weights" in text and "weight encoder." in text and text.splitlines()[-1].startswith("2. fp16-weights: ")
