"""The training report: the table by hand, what is drawn, and a page that needs nothing else."""

import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from refrag.errors import MissingExtraError, NotFoundError
from refrag.training.curves import Panel, Series, colours, draw_curves, short_number
from refrag.training.report import Stage, read_log, render_table, stage_table, write_report

LOG: list[dict[str, Any]] = [
    {"step": 10, "loss": 6.0, "learning_rate": 1e-4, "stage-1/loss": 6.5, "L=1/loss": 6.25, "L=2/loss": 7.0, "tokens_per_s": 100.0, "peak_memory_bytes": 2**30},
    {"step": 10, "eval_loss": 6.1, "eval_token_accuracy": 0.1, "eval_exact_match": 0.0, "eval_tokens": 64.0},
    {"step": 20, "loss": 4.0, "learning_rate": 2e-4, "stage-1/loss": 4.5, "L=16/loss": 5.0, "L=2/loss": 4.75, "tokens_per_s": 300.0, "peak_memory_bytes": 2**31},
    {"step": 30, "loss": 3.0, "learning_rate": 1e-4, "stage-2/loss": 3.5, "L=2/loss": 3.25, "tokens_per_s": 200.0, "peak_memory_bytes": 2**31},
    {"step": 30, "eval_loss": 3.1, "eval_token_accuracy": 0.4, "eval_exact_match": 0.25, "eval_tokens": 64.0},
    {"step": 40, "loss": 2.5, "learning_rate": 0.0, "p=0.05/loss": 2.5, "p=0.1/loss": 2.75, "p=0.1..0.3/loss": 1.5, "grad_norm": float("nan")},
]


def write_stage(folder: Path, log: list[dict[str, Any]] = LOG, **result: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log), encoding="utf-8")
    if result:
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_table_has_the_first_and_last_loss_of_each_kind() -> None:
    assert [(row["label"], row["first"], row["last"], row["first_step"], row["last_step"]) for row in stage_table(LOG)] == [
        ("curriculum stage 1", 6.5, 4.5, 10, 20),
        ("curriculum stage 2", 3.5, 3.5, 30, 30),
        ("1 chunk", 6.25, 6.25, 10, 10),
        ("2 chunks", 7.0, 3.25, 10, 30),
        ("16 chunks", 5.0, 5.0, 20, 20),
        ("5 % expanded", 2.5, 2.5, 40, 40),
        ("10 % expanded", 2.75, 2.75, 40, 40),
        ("10–30 % expanded", 1.5, 1.5, 40, 40),
    ]
    assert [(row["kind"], row["value"]) for row in stage_table(LOG)][2:6] == [("chunks", 1), ("chunks", 2), ("chunks", 16), ("expanded share", 0.05)]


def test_the_table_as_text() -> None:
    log = [{"step": 5, "L=8/loss": 12.5, "p=0.1/loss": 3.0}, {"step": 100, "L=8/loss": 4.0}]
    assert render_table(stage_table(log)).splitlines() == [
        "chunks or expanded share  first → last loss  steps",
        "8 chunks                  12.5000 →  4.0000  5–100",
        "10 % expanded              3.0000 →  3.0000  5–5",
    ]
    assert render_table([]) == ""


def test_other_kinds_have_a_row_and_a_log_without_kinds_has_one() -> None:
    log = [{"step": 1, "loss": 3.0, "none/loss": 2.0, "full/loss": 1.0, "eval_x/loss": 9.0}, {"step": 2, "loss": 2.0}]
    assert [(row["label"], row["first"]) for row in stage_table(log)] == [("full", 1.0), ("none", 2.0)]
    assert [(row["label"], row["first"], row["last"]) for row in stage_table([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}])] == [("all batches", 3.0, 2.0)]
    assert stage_table([{"step": 1, "eval_loss": 1.0}]) == []


def test_a_log_whose_last_line_was_cut_short(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_stage(tmp_path)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 50, "lo')
    assert [entry["step"] for entry in read_log(tmp_path)] == [10, 10, 20, 30, 30, 40]
    assert "1 lines of" in caplog.text


# ── the curves ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_drawn(tmp_path: Path) -> None:
    stage = Stage.read(write_stage(tmp_path, [*LOG, {"step": 50, "entropy": 1.5, "reward": -2.0}]))
    panels = {panel.title: panel for panel in stage.panels()}
    assert list(panels) == [
        "Loss", "Loss by number of chunks", "Loss by expanded share", "Loss by curriculum stage", "Predicted, held out", "Entropy", "Reward", "Learning rate", "Speed", "Peak memory",
    ]  # fmt: skip  # the gradient norm was never a number
    assert panels["Loss"].series == (Series("training", (10, 20, 30, 40), (6.0, 4.0, 3.0, 2.5)), Series("held out", (10, 30), (6.1, 3.1)))
    assert [series.label for series in panels["Loss by number of chunks"].series] == ["1", "2", "16"]
    assert [series.label for series in panels["Loss by expanded share"].series] == ["5 %", "10 %", "10–30 %"]
    assert panels["Peak memory"].series[0].values == (1.0, 2.0, 2.0)
    assert panels["Entropy"].series == (Series("Entropy", (50,), (1.5,)),)


@pytest.mark.parametrize(("value", "words"), [(0.0, "0"), (0.25, "0.25"), (1500.0, "1.5k"), (2e6, "2M"), (0.0002, "2e-4"), (-0.000175, "-1.75e-4"), (3.14159, "3.142")])
def test_numbers_on_an_axis(value: float, words: str) -> None:
    assert short_number(value) == words


def test_many_curves_have_as_many_colours() -> None:
    for theme in ("light", "dark"):
        for count, ordered in ((2, False), (9, True), (12, False)):
            panel = Panel("Loss", "", tuple(Series(str(place), (1,), (1.0,)) for place in range(count)), ordered)
            assert len(set(colours(panel, theme))) == count


def test_no_chart_at_all_is_still_a_picture() -> None:
    assert draw_curves([]).startswith(b"\x89PNG")


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Page(HTMLParser):
    """Collects the addresses that a page refers to, and checks that every element is closed."""

    VOID = ("meta", "img", "source", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.addresses, self.alts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        self.addresses += [named[name] for name in ("src", "srcset", "href") if name in named]
        self.alts += [named["alt"]] if tag == "img" else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_of_a_stage(tmp_path: Path) -> None:
    folder = write_stage(tmp_path / "cpt", stage="cpt", finished=True, steps=40, seconds=3700.0, best_step=30, eval_loss=3.1, counts={"rows": 1234, "bad": 0})
    (folder / "settings.json").write_text(json.dumps({"stage": "cpt", "text_field": "<script>alert(1)</script>", "data": ["a", "b"]}))
    assert write_report(folder) == folder / "report.html"
    png = (folder / "curves.png").read_bytes()
    assert png.startswith(b"\x89PNG") and struct.unpack(">II", png[16:24])[0] > 1000
    text = (folder / "report.html").read_text("utf-8")
    page = Page(text)
    assert page.open == []
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)  # nothing from elsewhere
    assert len(page.addresses) == 2 * len(Stage.read(folder).panels())  # light and dark
    assert "Loss over optimizer steps: training 6 to 2.5; held out 6.1 to 3.1" in page.alts
    assert "url(" not in text and "<script" not in text
    for words in ("finished", "1 h 1 min", "6 → 2.5", "rows 1,234 · bad 0", "<th>16</th><td>5.0000</td>", "&lt;script&gt;", 'name="viewport"', "prefers-color-scheme: dark"):
        assert words in text
    assert not re.search(r"\.tmp$", " ".join(path.name for path in folder.iterdir()))


def test_the_report_of_all_stages_and_of_trials(tmp_path: Path) -> None:
    for name in ("sft", "reconstruction", "cpt"):
        write_stage(tmp_path / "run" / name, [{"step": 1, "loss": 2.0}])
    (tmp_path / "run" / "other").mkdir()
    text = write_report(tmp_path / "run").read_text("utf-8")
    assert re.findall(r"<h2>(\w+) <small>([\w ]+)</small>", text) == [("reconstruction", "not finished"), ("cpt", "not finished"), ("sft", "not finished")]
    assert [address for address in Page(text).addresses if address.startswith("#")] == ["#stage-0", "#stage-1", "#stage-2"]
    for number in (10, 9):
        write_stage(tmp_path / "tune" / f"trial-{number}", [{"step": 1, "loss": 2.0}], stage="cpt", finished=False)
    assert re.findall(r"<h2>([\w -]+) <small>", write_report(tmp_path / "tune").read_text("utf-8")) == ["cpt in trial-9", "cpt in trial-10"]


def test_a_folder_without_a_log(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"There is no log\.jsonl in .*: name the output folder of a stage, or of a pipeline\."):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_extra_is_named_and_the_table_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"A report needs the package 'matplotlib': install it with  pip install 'refrag\[train\]'"):
        write_report(write_stage(tmp_path))
    assert render_table(stage_table(read_log(tmp_path)))


def test_a_policy_is_shown_by_its_reward(tmp_path):
    log = [{"step": step, "loss": 0.0, "grouped/loss": 0.0, "reward": -2.0 + step, "evidence_recall": 0.1 * step} for step in (1, 2)]
    table = render_table(stage_table(log))
    assert [line.split() for line in table.splitlines()[1:]] == [["evidence_recall", "0.1000", "→", "0.2000", "1–2"], ["reward", "-1.0000", "→", "0.0000", "1–2"]]
    assert "loss" not in table
