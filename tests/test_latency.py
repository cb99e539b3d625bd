"""The latency bench: intervals worked by hand, exact workloads, honest reads, results that can be read back."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from refrag.errors import InputError
from refrag.evaluation import latency, provenance
from refrag.evaluation.rounds import Samples, interleave, ratios
from refrag.evaluation.settings import LatencySettings, Reading
from refrag.evaluation.shapes import DECODERS, decoder_config, fill_randomly, random_refrag, vocabulary, word_tokenizer
from refrag.evaluation.statistics import Median, median_interval, percentile
from refrag.evaluation.views import interval_words
from refrag.evaluation.workload import Workload, build_model, compose
from refrag.model import RefragModel
from refrag.text import PromptBuilder

SMALL = {"shape": "tiny", "encoder_shape": "tiny", "context_tokens": 128, "question_tokens": 48, "chunk_size": 4, "num_passages": 2}
SETTINGS = LatencySettings(
    **SMALL, index_passages=6, min_repeats=6, max_repeats=6, baseline="full", uncached=True, in_memory=True, new_tokens=4, expand_fraction=0.25
)


@pytest.fixture(scope="module")
def model() -> RefragModel:
    return build_model(SETTINGS)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("bench") / "results" / "latency.json"
    measured = latency.run(LatencySettings(**{**SETTINGS.__dict__, "out": out}))
    assert json.loads(out.read_text(encoding="utf-8")) == json.loads(json.dumps(measured))
    return measured


# ── medians ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0], Median(3.0, float("-inf"), float("inf"))),  # 2 / 2**5 > 0.05: no interval
        ([6.0, 1.0, 2.0, 3.0, 5.0, 4.0], Median(3.5, 1.0, 6.0)),  # 2 / 2**6 = 0.031
        ([float(n) for n in range(1, 9)], Median(4.5, 1.0, 8.0)),  # 2 * (1 + 8) / 2**8 = 0.07: the ends, not the second ones
        ([float(n) for n in range(1, 10)], Median(5.0, 2.0, 8.0)),  # 2 * (1 + 9) / 2**9 = 0.039
        ([float(n) for n in range(1, 21)], Median(10.5, 6.0, 15.0)),  # the table value for n = 20
    ],
)
def test_median_intervals_worked_by_hand(values: list[float], expected: Median) -> None:
    assert median_interval(values) == expected


def test_the_interval_holds_the_true_median_at_least_95_times_in_100() -> None:
    rng = random.Random(0)
    held = sum(found.low <= 0 <= found.high for found in (median_interval([rng.gauss(0, 1) for _ in range(12)]) for _ in range(2000)))
    assert 0.95 <= held / 2000 < 0.99


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.5, 2.5), (0.95, 3.85), (1.0, 4.0)])
def test_percentiles_interpolate(share: float, expected: float) -> None:
    assert percentile([4.0, 2.0, 1.0, 3.0], share) == pytest.approx(expected)


def test_steady_means_the_interval_is_narrow_on_both_sides() -> None:
    assert Median(1.0, 0.98, 1.02).is_steady(0.02 + 1e-9)
    assert not Median(1.0, 0.97, 1.0).is_steady(0.02)
    assert not Median(1.0, 1.0, float("inf")).is_steady(0.02)


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that is ten times slower in one round does not move a ratio."""
    bare = [1.0, 1.0, 10.0, 1.0, 1.0, 1.0]
    samples = {name: Samples([scale * b for b in bare], [scale] * 6) for name, scale in (("cached", 1.25), ("bare", 1.0))}
    found = ratios(samples, {"cached_over_bare": ("cached", "bare"), "full_over_bare": ("full", "bare")}, 0.02)
    assert found == {"cached_over_bare": {"median": 1.25, "low": 1.25, "high": 1.25, "steady": True, "cpu_median": 1.25, "rounds": 6}}


def test_every_system_serves_every_request_once_and_two_requests_warm_up() -> None:
    """Steady after the fewest rounds: what counts is what the systems say."""
    served: dict[str, list[int]] = {"a": [], "b": []}
    systems = {name: (lambda request, name=name: served[name].append(request) or {"a": 3.0, "b": 2.0}[name]) for name in served}
    samples = interleave(systems, {"a_over_b": ("a", "b")}, iter(range(100)), LatencySettings(**SMALL, min_repeats=6), seconds=lambda result, wall: result)
    assert served == {"a": list(range(8)), "b": list(range(8))}
    assert samples["a"].seconds == [3.0] * 6
    assert len(samples["a"].cpu_s) == len(samples["a"].results) == 6


@pytest.mark.parametrize(("high", "words"), [(1.1, "1.050 [1.000, 1.100]"), (None, "1.050 [1.000, open]"), (float("inf"), "1.050 [1.000, open]")])
def test_an_interval_in_words(high: float | None, words: str) -> None:
    assert interval_words({"median": 1.05, "low": 1.0, "high": high}) == words


# ── models and text ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("shape", "parameters"), [("smollm2-135m", 134_515_008), ("llama-3.2-1b", 1_235_814_400), ("llama-3.2-3b", 3_212_749_824), ("llama-2-7b", 6_738_415_616)]
)
def test_shapes_have_the_published_numbers_of_parameters(shape: str, parameters: int) -> None:
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(decoder_config(shape))
    assert sum(weight.numel() for weight in decoder.parameters()) == parameters
    assert set(Reading.__annotations__["shape"].__args__) == set(DECODERS)


def test_random_weights_are_ready_to_use() -> None:
    config = decoder_config("tiny")
    filled = fill_randomly(AutoModelForCausalLM, config, dtype=torch.float32, device=torch.device("cpu"))
    reference = AutoModelForCausalLM.from_config(config)
    assert filled.lm_head.weight is filled.model.embed_tokens.weight
    for name, buffer in reference.named_buffers():
        assert torch.equal(dict(filled.named_buffers())[name], buffer)
    deviations = [weight.std().item() for weight in filled.parameters() if weight.dim() > 1]
    assert deviations == pytest.approx([0.02] * len(deviations), rel=0.1)
    assert all(torch.equal(weight, torch.ones_like(weight)) for weight in filled.parameters() if weight.dim() == 1)


def test_building_the_whole_model_draws_no_weight_again(model: RefragModel) -> None:
    """All matrices begin as the one random block does: a part that drew its own numbers would differ."""
    starts = {tuple(weight.flatten()[:8].tolist()) for part in (model.decoder, model.encoder) for weight in part.parameters() if weight.dim() > 1}
    assert len(starts) == 2  # one block for the decoder, one for the encoder
    assert model.has_trained_policy
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_a_saved_model_is_measured_by_name(tmp_path: Path) -> None:
    saved = random_refrag("tiny", "tiny", chunk_size=8, dtype=torch.float32, device=torch.device("cpu"), seed=3)
    saved.save_pretrained(tmp_path / "mine")
    loaded = build_model(LatencySettings(**SMALL, model=str(tmp_path / "mine"), dtype="float32", index_passages=2))
    assert loaded.config.chunk_size == 8
    assert torch.equal(loaded.decoder.lm_head.weight, saved.decoder.lm_head.weight)
    assert len(Workload.make(loaded, SETTINGS).passages) == 6


def test_every_word_is_one_token() -> None:
    words = vocabulary(0)
    tokenizer = word_tokenizer(words)
    assert len(set(words)) == 1000
    assert len(tokenizer(" ".join(words))["input_ids"]) == 1000
    assert tokenizer.decode(tokenizer(" ".join(words))["input_ids"]) == " ".join(words)


@pytest.mark.parametrize("num_tokens", [1, 2, 17, 512])
def test_composed_text_has_the_length_asked_for(num_tokens: int) -> None:
    words = vocabulary(1)
    tokenizer = word_tokenizer(words)
    text = compose(words, num_tokens, random.Random(0), lambda text: len(tokenizer(text)["input_ids"]))
    assert len(tokenizer(text)["input_ids"]) == num_tokens


def test_a_prompt_has_the_context_and_question_tokens_asked_for(model: RefragModel) -> None:
    workload = Workload.make(model, SETTINGS)
    draws = workload.draws(SETTINGS)
    first, second = next(draws), next(draws)
    assert len(workload.passages) == 6
    assert first != second
    prompt = PromptBuilder(model.tokenizer, chunk_size=4).build(workload.question, first)
    chunk_tokens = sum(len(chunk.token_ids) for chunk in prompt.chunks)
    assert chunk_tokens == 128
    assert len(prompt.token_ids()) - chunk_tokens == 48


def test_a_template_that_does_not_fit_is_refused(model: RefragModel) -> None:
    with pytest.raises(InputError, match=r"question_tokens must hold the template and the numbers of 2 passages, \d+ tokens, was 5: try \d+"):
        Workload.make(model, LatencySettings(**{**SMALL, "question_tokens": 5}, index_passages=6))


# ── the measurement ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_result_counts_what_was_asked_for(content: dict) -> None:
    work = content["workload"]
    assert work["num_chunks"] == 32
    assert work["expanded_chunks"] == 8
    assert work["prompt_slots"] == 48 + 24 + 8 * 4
    assert work["full_slots"] == 48 + 128
    assert work["kv_bytes"] == 2 * 2 * 2 * 16 * work["prompt_slots"] * 2  # keys and values, layers, kv heads, head width, slots, bytes of bf16


def test_every_system_has_a_sample_of_every_round(content: dict) -> None:
    assert set(content["systems"]) == {"cached", "bare", "full", "uncached", "memory"}
    assert content["rounds"] == 6
    for system in content["systems"].values():
        assert len(system["samples_s"]) == content["rounds"]
        assert min(system["samples_s"]) <= system["p50_s"] <= system["p95_s"] <= max(system["samples_s"]) + 1e-6
    assert set(content["ratios"]) == set(latency.RATIOS) | set(latency.TTIT_RATIOS)
    assert content["steady"] == all(ratio["steady"] for ratio in content["ratios"].values())


def test_stages_make_up_the_time_to_first_token(content: dict) -> None:
    cached = content["systems"]["cached"]
    assert {"prompt_s", "vectors_s", "question_s", "sense_s", "layout_s", "project_s", "prefill_s", "other_s"} <= set(cached["stages_s"])
    assert cached["stages_s"]["vectors_s"] > 0
    assert sum(cached["stages_s"].values()) == pytest.approx(cached["p50_s"], rel=0.5)  # medians of parts, not parts of a median
    assert content["systems"]["bare"]["stages_s"] == {}
    assert 0 < content["shares"]["reading"] < 1
    assert 0 < content["shares"]["policy_and_projector"] < 1


def test_time_between_tokens_is_that_of_tokens_after_the_first(content: dict) -> None:
    decoding = content["decoding"]
    assert decoding["new_tokens"] == 4
    assert set(decoding["systems"]) == {"cached", "full", "generate"}
    assert content["ratios"]["ttit_cached_over_generate"]["cpu_median"] is None
    for system in decoding["systems"].values():
        assert 0 < system["p50_s"] < content["systems"]["full"]["p95_s"]


def test_sizes_and_limits_by_hand(content: dict) -> None:
    """One layer of the tiny decoder has 36,864 weights in its matrices; 104 slots against 176, logits of 8,192 words once."""
    systems = content["systems"]
    assert {name: own["slots"] for name, own in systems.items()} == {"cached": 104, "bare": 104, "full": 176, "uncached": 104, "memory": 104}

    def decoder(slots: int) -> int:
        return 2 * 64 * 8192 + slots * 2 * 2 * 36864 + (slots * (slots + 1) // 2) * 2 * 2 * 2 * 64

    projector = 24 * 2 * (32 * 256 + 256 * 64)  # 24 of 32 chunks are not expanded

    def encoder_over(tokens: int) -> int:  # 2 layers
        return 2 * (tokens * 2 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 2 * tokens * tokens * 32)

    encoder = 32 * encoder_over(6)  # 4 tokens and 2 special ones a chunk
    question = content["workload"]["policy"]["question_encoder_tokens"]
    layer = 33 * 2 * (4 * 256 * 256 + 2 * 256 * 1024) + 2 * 2 * 33 * 33 * 256  # 32 chunks and the question
    policy = 65 * 2 * 32 * 256 + 2 * 32 * 32 * 32 + 2 * layer + 32 * 2 * 256  # of chunks, passages and question; means of passages; logits
    stored = projector + encoder_over(question) + policy
    assert question > 2
    assert systems["bare"]["flops"] == decoder(104)
    assert systems["full"]["flops"] == decoder(176)
    assert systems["cached"]["flops"] == systems["memory"]["flops"] == decoder(104) + stored
    assert systems["uncached"]["flops"] == decoder(104) + stored + encoder
    assert content["limits"]["full_over_cached"] == decoder(176) / (decoder(104) + stored)
    assert systems["full"]["kv_bytes"] == 176 * content["workload"]["kv_bytes"] // 104


def test_the_papers_policy_does_not_read_the_question() -> None:
    made = latency.measure(LatencySettings(**SMALL, min_repeats=6, max_repeats=6, question_aware=False))
    assert made["workload"]["policy"] == {"name": "learned", "learned": True, "question_encoder_tokens": 0}
    with pytest.raises(InputError, match="A trained model has its own policy, --model bundled was given with --no-question-aware"):
        LatencySettings(model="bundled", question_aware=False)


def test_the_counted_bytes_are_those_of_the_cache(model: RefragModel, content: dict) -> None:
    slots = content["workload"]["prompt_slots"]
    with torch.no_grad():
        cache = model.decoder(input_ids=torch.ones(1, slots, dtype=torch.long), use_cache=True).past_key_values
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == content["workload"]["kv_bytes"]


def test_a_cached_request_reads_every_passage_from_the_index(model: RefragModel, tmp_path: Path) -> None:
    from refrag.config import IndexSettings
    from refrag.index import PassageIndex

    workload = Workload.make(model, SETTINGS)
    index = PassageIndex.create(tmp_path / "index", model, IndexSettings())
    index.add(workload.passages)
    read: list[list[str]] = []

    class Counted(latency.IdsInHand):
        def stored(self, ids: list[str]) -> dict:
            read.append(list(ids))
            return super().stored(ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "IdsInHand", Counted)
        systems = latency.build_systems(model, index, workload, SETTINGS)
    read.clear()
    request = workload.passages[2:4]
    for _ in range(2):
        systems["cached"](request)
    assert read == [["p2", "p3"]] * 2
    assert systems["full"](request).usage["prompt_slots"] == 48 + 128
    encoded: list[int] = []
    encode = model.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "encode", lambda texts, **kwargs: encoded.append(len(texts)) or encode(texts, **kwargs))
        memory = systems["memory"](request)
    assert encoded == [1], "the policy looks at the question; the chunks' vectors are there"
    assert len(read) == 2, "plain RAG, and vectors computed or in memory, leave the index alone"
    assert systems["uncached"](request).usage == systems["cached"](request).usage == memory.usage


def test_the_summary_says_so_when_a_ratio_is_not_steady(content: dict) -> None:
    ratio = content["ratios"]["cached_over_bare"]
    shaken = {**content, "ratios": {"cached_over_bare": {**ratio, "steady": False}}}
    assert f"NOT STEADY after {content['rounds']} rounds" in latency.summary(shaken)
    calm = {**content, "ratios": {"cached_over_bare": {**ratio, "steady": True}}}
    assert "NOT STEADY" not in latency.summary(calm)
    assert "cached over bare" in latency.summary(calm)


def test_the_summary_prints_what_flops_allow(content: dict) -> None:
    limits = content["limits"]
    assert latency.summary(content).splitlines()[-1] == (
        f"causal FLOPs of this shape and question allow plain RAG ÷ REFRAG of {limits['full_over_cached']:.2f} with stored vectors, "
        f"{limits['full_over_uncached']:.2f} with vectors computed in the request"
    )


def test_a_sweep_goes_on_behind_a_point_that_fails(tmp_path: Path) -> None:
    """A file lies where the second point would put its index; the next one is measured all the same."""
    out = tmp_path / "sweep.json"
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "32-4").touch()
    settings = LatencySettings(**SMALL, index_passages=2, min_repeats=6, max_repeats=6, sweep_context=(32, 16), index=tmp_path / "index", out=out)
    content = latency.run(settings)
    assert content["kind"] == "latency-sweep"
    assert json.loads(out.read_text("utf-8"))["points"][1]["workload"]["num_chunks"] == 4
    bad, good = content["points"]
    assert "failed" not in good and good["peak_rss_bytes"] > 0
    assert bad["failed"] == f"{tmp_path / 'index' / '32-4'} is a file, an index needs a folder: pass another --index."
    assert [line.split(":")[0] for line in latency.summary(content).splitlines()] == ["32 context tokens, k = 4", "16 context tokens, k = 4"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep_context": (64, 65)}, "sweep_context must divide evenly over num_passages, were 65 and 2: try sweep_context 64"),
        ({"sweep_chunk_size": (8, 0)}, "sweep_chunk_size must be 1 or more, was 0: try 8 16 32"),
        ({"model": "bundled", "sweep_chunk_size": (8,)}, "A trained model has its own chunk size, --model bundled was given with sweep_chunk_size"),
        ({"new_tokens": 0}, "new_tokens must be 1 or more, was 0"),
        ({"threads": 0}, "threads must be 1 or more, was 0"),
        ({"min_repeats": 5}, "min_repeats must be 6 or more"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LatencySettings(**SMALL, **changes)


# ── where a result comes from ────────────────────────────────────────────────────────────────────────────────────────


def test_a_result_says_where_it_comes_from(content: dict) -> None:
    assert (content["schema"], content["kind"]) == (provenance.SCHEMA_VERSION, "latency")
    source = content["provenance"]
    assert {"torch", "transformers", "refrag", "python"} <= set(source["versions"])
    assert source["seed"] == 0
    assert source["date"].endswith("+00:00")
    assert source["machine"]["cores"] >= 1
    assert "out" not in content["settings"]


def test_a_recorded_command_holds_no_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = Path.cwd() / "results" / "a.json"
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "bin" / "refrag"), "bench", "--out", str(inside), f"--index={tmp_path / 'index'}", "--seed", "1"])
    command = provenance.provenance()["command"]
    assert command == f"refrag bench --out {Path('results') / 'a.json'} --index=index --seed 1"


def test_results_are_read_back_and_others_refused(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    provenance.write_result(path, provenance.result("latency", settings={"k": 16}, values={"x": 1}))
    assert provenance.read_result(path, kind="latency")["x"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]
    with pytest.raises(InputError, match="must hold a 'qa' result of schema 1, holds 'latency' of schema 1: measure it again"):
        provenance.read_result(path, kind="qa")
    path.write_text("[1, 2", encoding="utf-8")
    with pytest.raises(InputError, match="A result must be a JSON file"):
        provenance.read_result(path, kind="latency")


def test_the_commit_is_that_of_the_checkout(tmp_path: Path) -> None:
    root = Path(latency.__file__).parents[3]
    head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True)
    tracked = subprocess.run(["git", "ls-files", "--error-unmatch", latency.__file__], cwd=root, capture_output=True)
    commit = provenance.provenance()["commit"]
    if head.returncode or tracked.returncode:
        assert commit is None
    else:
        assert commit is not None
        assert commit.removesuffix("-dirty") in head.stdout or "-g" in commit
