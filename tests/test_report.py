"""The page of results: what each kind shows, what is refused, and that it needs nothing else. All results here are written by hand."""

import copy
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from refrag.cli import main
from refrag.errors import InputError, NotFoundError
from refrag.evaluation.report import read_all, render, write_report
from refrag.evaluation.views import PAPER, PAPER_TOKENS, view
from refrag.training.curves import Series

PROVENANCE = {"date": "2026-11-24T10:00:00+00:00", "command": "refrag bench --x <1>", "commit": "abc123", "seed": 3, "versions": {"torch": "2.13"}, "machine": {"processor": "A CPU", "gpu": None}}


def ratio(median: float, steady: bool = True) -> dict[str, Any]:
    return {"median": median, "low": median - 0.5, "high": None, "steady": steady, "cpu_median": median, "rounds": 7}


def system(seconds: float, **more: Any) -> dict[str, Any]:
    return {"p50_s": seconds, "p95_s": 2 * seconds, "cpu_median_s": seconds, "samples_s": [seconds], **more}


def point(tokens: int, size: int, accelerated: float) -> dict[str, Any]:
    return {
        "context_tokens": tokens,
        "chunk_size": size,
        "ratios": {"full_over_cached": ratio(accelerated), "full_over_uncached": ratio(accelerated / 2), "cached_over_bare": ratio(1.03), "ttit_full_over_cached": ratio(1.5)},
        "limits": {"full_over_cached": 20.0},
        "systems": {"cached": system(0.5), "uncached": system(1.0), "full": system(0.5 * accelerated)},
        "steady": True,
    }


TRACE = [
    {"passage_id": "p1", "title": "Harbour", "start": 0, "end": 9, "text": "The small", "expanded": False, "score": 0.1},
    {"passage_id": "p1", "title": "Harbour", "start": 8, "end": 20, "text": "l <harbour>.", "expanded": True, "score": 0.9},
]
RESULTS: dict[str, dict[str, Any]] = {
    "latency-sweep": {"points": [point(512, 16, 2.0), point(1024, 16, 4.0), {"context_tokens": 2048, "chunk_size": 16, "failed": "out of memory"}]},
    "throughput": {
        "points": [
            {"batch_size": size, "ratios": {"full_over_cached": ratio(1.5)}, "systems": {name: {"tokens_per_s": size * speed, "kv_bytes": size << 20} for name, speed in (("cached", 3.0), ("full", 2.0))}}
            for size in (1, 2)
        ]
    },
    "training": {
        "points": [
            {
                "context_tokens": 1024, "gradient_checkpointing": mode, "ratios": {"step_over_parts": ratio(1.1)}, "peak_memory_bytes": (3 - mode) * 2**30,
                "systems": {name: {"p50_s": 0.25} for name in ("step", "decoder", "encoder", "optimizer")},
            }
            for mode in (False, True)
        ]
    },
    "qa": {
        "systems": {
            "plain": {"metrics": {"f1": {"mean": 0.9, "low": 0.8, "high": 1.0}}, "prompt_slots": 600, "ttft_s": {"median": 0.4, "low": 0.3, "high": 0.5}},
            "refrag": {"metrics": {"f1": {"mean": 0.7, "low": 0.6, "high": 0.8}}, "prompt_slots": 100, "ttft_s": {"median": 0.1, "low": 0.1, "high": 0.1}},
            "worse": {"metrics": {"f1": {"mean": 0.6, "low": 0.5, "high": 0.7}}, "prompt_slots": 200, "ttft_s": {"median": 0.2, "low": 0.1, "high": 0.3}},
        },
        "examples": [{"question": "What is <small>?", "answers": ["The harbour"], "systems": {"refrag": {"text": "a harbour", "trace": TRACE}}}],
    },
    "from-the-future": {"speeds": {"red": {"metres": 1.5, "of": {"x": 1}}, "blue": {"metres": 2}}, "count": 7, "list": [{"a": 1, "b": "two"}]},
}  # fmt: skip


def content(kind: str, **changes: Any) -> dict[str, Any]:
    return {"schema": 1, "kind": kind, "settings": {"seed": 3, "nested": {"k": 16}}, **copy.deepcopy(RESULTS.get(kind, {})), "provenance": PROVENANCE, **changes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for kind in RESULTS:
        (tmp_path / f"{kind}.json").write_text(json.dumps(content(kind)), encoding="utf-8")
    return tmp_path


class Page(HTMLParser):
    """Every element is closed; addresses are kept."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.open, self.addresses = [], []
        self.feed(words)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for name, value in attributes if name in ("src", "srcset", "href")]
        if tag not in ("meta", "img", "source", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_our_curve_and_the_paper_s_stand_on_the_same_axes() -> None:
    shown = view(content("latency-sweep"))
    first, ttit, seconds = shown.panels
    assert (first.title, first.unit, first.over, first.log) == ("Acceleration to the first token, k = 16", "times plain RAG", "context tokens", "x")
    assert [(own.label, own.line) for own in first.series] == [
        ("vectors on disk", "solid"), ("vectors computed", "solid"), ("causal FLOPs allow", "dotted"), ("paper (7B, A100), cached", "dashed"), ("paper (7B, A100), not cached", "dashed"),
    ]  # fmt: skip
    assert (first.series[0].steps, first.series[0].values) == ((512, 1024), (2.0, 4.0))
    assert first.series[3] == Series("paper (7B, A100), cached", (512, 1024, 2048), (1.14, 2.16, 3.74), "dashed", 0)
    assert first.series[3].colour == first.series[0].colour
    assert [own.label for own in ttit.series] == ["vectors on disk", "paper (7B, A100)"]
    assert [own.values for own in seconds.series] == [(1.0, 2.0), (0.5, 0.5)]
    assert shown.tables[0].rows[0] == [512, 16, "2.00 [1.50, open]", "1.00 [0.50, open]", "20.00", "1.030 [0.530, open]", 500.0, 1000.0, 1000.0, "yes"]
    assert shown.tables[0].rows[2] == [2048, 16, "out of memory"]


def test_the_paper_s_numbers() -> None:
    assert all(len(curve) == len(PAPER_TOKENS) for curves in PAPER.values() for curve in curves.values())
    at = PAPER_TOKENS.index(16384)
    assert (PAPER["ttft"][16][at], PAPER["ttft_uncached"][16][at], PAPER["ttft"][32][at]) == (16.54, 8.59, 30.85)


def test_the_front_holds_what_nothing_beats() -> None:
    time, slots = view(content("qa")).panels
    assert [(own.label, own.steps, own.values) for own in time.series] == [
        ("refrag", (100.0,), (0.7,)), ("worse", (200.0,), (0.6,)), ("plain", (400.0,), (0.9,)), ("nothing is better and cheaper", (100.0, 400.0), (0.7, 0.9)),
    ]  # fmt: skip
    assert slots.series[-1].steps == (100.0, 600.0)


def test_an_unknown_kind_is_a_plain_table() -> None:
    shown = view(content("from-the-future"))
    assert shown.heading == "From the future"
    assert shown.facts == {"count": 7}
    assert [(table.title, table.header, table.rows) for table in shown.tables] == [
        ("speeds", ("", "Metres", "Of: x"), [["red", 1.5, 1], ["blue", 2, None]]),
        ("list", ("", "A", "B"), [["1", 1, "two"]]),
    ]


@pytest.mark.parametrize("kind", ["latency", "latency-sweep", "throughput", "indexing", "training", "qa"])
def test_a_known_kind_with_other_values_is_a_plain_table_too(kind: str) -> None:
    shown = view({"schema": 1, "kind": kind, "rows": [{"x": 1}], "points": [{"y": 2}], "systems": 5})
    assert ["1", 1] in [row for table in shown.tables for row in table.rows]


def test_training_with_and_without_checkpointing() -> None:
    step, memory, _ = view(content("training")).panels
    assert [(own.label, own.values) for own in memory.series] == [("without", (3.0,)), ("with checkpointing", (2.0,))]
    assert [own.values for own in step.series] == [(0.25,), (0.25,)]


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_needs_nothing_else(folder: Path) -> None:
    assert write_report([folder], folder / "out" / "report.html", png=folder / "png") == (5, [])
    words = (folder / "out" / "report.html").read_text("utf-8")
    addresses = Page(words).addresses
    assert all(address.startswith(("data:image/svg+xml;base64,", "#")) for address in addresses)
    assert "url(" not in words and "<script" not in words and "@import" not in words
    assert sum(address.startswith("#") for address in addresses) == 5
    for part in ("prefers-color-scheme: dark", 'name="viewport"', "<small>latency-sweep</small>", '<td class="failed" colspan="8">out of memory</td>', "What is &lt;small&gt;?"):
        assert part in words
    names = sorted(path.name for path in (folder / "png").iterdir())
    assert "latency-sweep-acceleration-to-the-first-token-k-16.png" in names
    assert len(names) == 3 + 1 + 3 + 2
    assert all((folder / "png" / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_examples_mark_what_was_expanded_and_show_a_shared_character_once(folder: Path) -> None:
    words = render(read_all([folder / "qa.json"])[0])
    assert '<b>Harbour</b> <span title="score 0.1">The small</span><mark title="score 0.9"> &lt;harbour&gt;.</mark>' in words
    assert "<h3>refrag: a harbour</h3>" in words and "Expected: The harbour" in words


def test_chunks_without_a_text_are_cut_from_their_passages(tmp_path: Path) -> None:
    trace = [{"passage_id": 7, "start": 0, "end": 4, "expanded": True}, {"passage_id": 7, "start": 4, "end": 9, "expanded": False}, "broken", {"passage_id": 8}]
    example = {"question": "Q", "answer": "A", "passages": [{"id": 7, "title": "T", "text": "The house."}], "trace": trace, "prediction": "P"}
    words = render(read_all([_write(tmp_path / "any.json", {"schema": 1, "kind": "any", "examples": [example, 5]})])[0])
    assert '<h3>answer: P</h3><p class="trace"><b>T</b> <mark>The </mark><span>house</span></p><p class="trace"><b>8</b> <span></span></p>' in words
    Page(words)


def test_every_number_says_where_it_comes_from(folder: Path) -> None:
    words = render(read_all([folder / "training.json"])[0])
    assert "<code>refrag bench --x &lt;1&gt;</code>" in words
    assert "2026-11-24T10:00:00+00:00 · commit abc123 · A CPU" in words
    for name, value in (("versions.torch", "2.13"), ("settings.nested.k", "16"), ("machine.processor", "A CPU")):
        assert f"<tr><th>{name}</th><td>{value}</td></tr>" in words
    bare = render(read_all([_write(folder / "bare.json", {"schema": 1, "kind": "bare", "x": 1})])[0])
    assert "Nobody noted the command." in bare


def _write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_what_cannot_be_shown_is_one_sentence_and_the_rest_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(folder / "old.json", {"schema": 0, "kind": "latency"})
    _write(folder / "broken.json", "[1, 2")
    _write(folder / "list.json", "[]")
    assert main(["report", str(folder), "--out", str(folder / "report.html")]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(f"left out: A result must be a JSON file, {folder / 'broken.json'} could not be read as one")
    assert lines[1:] == [
        f"left out: {folder / 'list.json'} must hold a result of schema 1, holds None of schema None: measure it again with this version.",
        f"left out: {folder / 'old.json'} must hold a result of schema 1, holds 'latency' of schema 0: measure it again with this version.",
        f"5 results in {folder / 'report.html'}",
    ]
    assert "holds &#x27;latency&#x27; of schema 0" in (folder / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["./missing"], "There is no file or folder missing: check the path."),
        (["EMPTY"], "There is no results file in EMPTY: measure one with  refrag bench … --out results/NAME.json"),
        (["BAD"], "There is no result to show: A result must be a JSON file"),
        (["GOOD", "--out", "EMPTY"], "out must name a file, EMPTY is a folder: try --out EMPTY/report.html."),
        (["GOOD", "--out", "BAD/report.html"], "out must lie in a folder that can be written to, BAD is a file: choose another --out."),
        ([], "Name the results to show, files or folders:  refrag report results/"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": str(tmp_path / "empty"), "BAD": str(_write(tmp_path / "bad.json", "{")), "GOOD": str(_write(tmp_path / "good.json", content("throughput")))}
    for name, place in places.items():
        sentence = sentence.replace(name, place)
        arguments = [word.replace(name, place) for word in arguments]
    assert main(["report", *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"refrag: {sentence}") and len(said.err.splitlines()) == 1


def test_refusals_name_the_reason(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="There is no file or folder"):
        read_all([tmp_path / "no"])
    with pytest.raises(InputError, match="holds 'x' of schema 2"):
        write_report([_write(tmp_path / "a.json", {"schema": 2, "kind": "x"})], tmp_path / "r.html")


def test_the_report_imports_no_torch(folder: Path) -> None:
    code = "import sys\nfrom refrag.cli import main\nassert main() == 0\nassert not {'torch', 'transformers', 'lancedb'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, "report", str(folder / "training.json"), "--out", str(folder / "r.html")], check=True, capture_output=True)


def test_cells_of_answers_are_a_row_a_system_and_a_curve_over_their_first_number() -> None:
    def answered(mean: float, less: float | None) -> dict[str, Any]:
        own = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}
        against = {} if less is None else {"exact_match": {"mean": less, "low": less - 0.01, "high": less + 0.01}}
        return {"metrics": {"exact_match": own}, "against_plain": against, "compression_rate": 4.0, "prompt_slots": 100, "num_failed": 0}

    made = [{"turns": turns, "per_turn": per, "data": {"questions": 9}, "systems": {"plain": answered(turns / 10, None), "none": answered(0.5, -0.2)}} for turns in (4, 2) for per in (2, 8)]
    shown = view({"schema": 1, "kind": "conversations", "cells": made})
    assert [panel.title for panel in shown.panels] == ["Exact match, per turn 2", "Exact match, per turn 8"]
    assert [(own.label, own.steps, own.values) for own in shown.panels[0].series] == [("plain", (2, 4), (0.2, 0.4)), ("none", (2, 4), (0.5, 0.5))]
    assert shown.tables[0].rows[1] == [4, 2, "none", "0.500 [0.400, 0.600]", "-0.200 [-0.210, -0.190]", 4.0, 100, None]
