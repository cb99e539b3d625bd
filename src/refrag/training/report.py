"""The report of a training: curves as PNG, one HTML page that needs nothing else, and the table of first and last losses.

Reads what a stage leaves in its folder: log.jsonl (one JSON object an entry: step, loss, …), result.json and settings.json.
"""

import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import NotFoundError
from .curves import Panel, Series, draw_curves
from .html_page import figure, is_number, number, page, shown, text, title_of, write_whole
from .settings import STAGE_SETTINGS

logger = logging.getLogger(__name__)

Entry = dict[str, Any]
SHOWN = ("eval_loss", "eval_token_accuracy", "eval_exact_match")
NOT_CURVES = frozenset(("step", "epoch", "eval_tokens", "eval_runtime", "total_flos", "train_runtime"))


# ── the log and its table ────────────────────────────────────────────────────────────────────────────────────────────


def read_log(folder: Path) -> list[Entry]:
    """The entries of log.jsonl in their order; lines that were cut short are left out, and counted in a warning.

    Raises NotFoundError when there is no log.
    """
    path = folder / "log.jsonl"
    if not path.is_file():
        raise NotFoundError(f"There is no log.jsonl in {folder}: name the output folder of a stage, or of a pipeline.")
    entries, lines = [], path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        entry = _object(line)
        if "step" in entry:
            entries.append(entry)
    if len(entries) < len(lines):
        logger.warning("%d lines of %s could not be read and were left out", len(lines) - len(entries), path)
    return entries


def stage_table(log: Sequence[Entry]) -> list[dict[str, Any]]:
    """First and last unscaled loss of every kind of batch in a log: curriculum stages, numbers of chunks, expanded shares, others.

    Kinds are the keys `stage-3/loss`, `L=8/loss`, `p=0.1/loss`, `NAME/loss`; a log without any has one row for `loss`. The policy's objectives, whose losses
    are near 0 by construction, have `reward` and `evidence_recall` instead. A row is {"kind", "value", "label", "short", "first", "last", "first_step", "last_step"}, losses in nats a token.
    """
    rows: dict[str, dict[str, Any]] = {}
    named = any(_kinds(entry) for entry in log)
    for entry in log:
        shown = _kinds(entry) if named else {"": entry["loss"]} if "loss" in entry else {}
        rewards = {name: entry[name] for name in ("reward", "evidence_recall") if "reward" in entry and name in entry}
        for name, loss in (rewards or shown).items():
            row = rows.setdefault(name, {**_kind(name), "first": loss, "first_step": entry["step"]})
            row |= {"last": loss, "last_step": entry["step"]}
    return sorted(rows.values(), key=_place)


def render_table(rows: Sequence[dict[str, Any]]) -> str:
    """The same as text: one line a kind, `label   first → last   steps`; empty for no rows."""
    if not rows:
        return ""
    lines = [("chunks or expanded share", f"first → last{'' if rows[0]['kind'] == 'batch' and rows[-1]['label'] == 'reward' else ' loss'}", "steps")]
    lines += [(row["label"], f"{row['first']:7.4f} → {row['last']:7.4f}", f"{row['first_step']}–{row['last_step']}") for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _kinds(entry: Entry) -> dict[str, float]:
    """Losses by the name of the batch."""
    return {key.removesuffix("/loss"): value for key, value in entry.items() if key.endswith("/loss") and not key.startswith("eval_")}


def _kind(name: str) -> dict[str, Any]:
    """What the name of a batch says: its kind, a value to sort by, and words, with and without the kind."""
    if match := re.fullmatch(r"stage-(\d+)", name):
        return {"kind": "curriculum stage", "value": int(match[1]), "label": f"curriculum stage {match[1]}", "short": match[1]}
    if match := re.fullmatch(r"L=(\d+)", name):
        return {"kind": "chunks", "value": int(match[1]), "label": f"{match[1]} chunk{'s' * (match[1] != '1')}", "short": match[1]}
    if match := re.fullmatch(r"p=([\d.e-]+?)(?:\.\.([\d.e-]+))?", name):
        shares = [100 * float(share) for share in match.groups() if share is not None]
        words = f"{'–'.join(f'{share:g}' for share in shares)} %"
        return {"kind": "expanded share", "value": shares[0] / 100, "label": f"{words} expanded", "short": words}
    return {"kind": "batch", "value": name, "label": name or "all batches", "short": name or "all"}


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    order = ("curriculum stage", "chunks", "expanded share", "batch")
    is_text = isinstance(row["value"], str)
    return order.index(row["kind"]), 0 if is_text else row["value"], str(row["value"]) if is_text else row["label"]


def _object(text: str) -> Entry:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


# ── what is drawn ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Stage:
    """What is known of one stage."""

    name: str
    log: list[Entry]
    result: Entry
    settings: Entry

    @classmethod
    def read(cls, folder: Path) -> "Stage":
        """Raises NotFoundError when the folder has no log."""
        result, settings = (_object(path.read_text("utf-8")) if path.is_file() else {} for path in (folder / "result.json", folder / "settings.json"))
        stage = result.get("stage") or settings.get("stage")
        name = stage if stage == folder.name or stage is None else f"{stage} in {folder.name}"
        return cls(name or folder.name, read_log(folder), result, settings)

    def panels(self) -> list[Panel]:
        """The charts that the log has values for."""
        return [panel for panel in _panels(self.log) if panel.series]


def _panels(log: Sequence[Entry]) -> list[Panel]:
    kinds = {name: _kind(name) for name in dict.fromkeys(name for entry in log for name in _kinds(entry))}
    drawn: set[str] = set()

    def series(names: Iterable[tuple[str, str]], scale: float = 1.0) -> tuple[Series, ...]:
        names = list(names)
        drawn.update(key for key, _ in names)
        return tuple(one for key, label in names if (one := _series(log, key, label, scale)).steps)

    def losses(kind: str) -> tuple[Series, ...]:
        rows = sorted(((row, name) for name, row in kinds.items() if row["kind"] == kind), key=lambda row: _place(row[0]))
        return series((f"{name}/loss", row["short"]) for row, name in rows)

    panels = [
        Panel("Loss", "nats a token", series([("loss", "training"), ("eval_loss", "held out")])),
        Panel("Loss by number of chunks", "nats a token", losses("chunks"), ordered=True),
        Panel("Loss by expanded share", "nats a token", losses("expanded share"), ordered=True),
        Panel("Loss by curriculum stage", "nats a token", losses("curriculum stage"), ordered=True),
        Panel("Loss by kind of batch", "nats a token", losses("batch")),
        Panel("Predicted, held out", "share", series([("eval_token_accuracy", "tokens"), ("eval_exact_match", "rows in full")])),
        Panel("Answers in full, training", "share", series((f"{name}/exact_match", row["label"]) for name, row in kinds.items())),
    ]
    last = [
        Panel("Learning rate", "", series([("learning_rate", "learning rate")])),
        Panel("Gradient norm", "", series([("grad_norm", "gradient norm")])),
        Panel("Speed", "tokens a second", series([("tokens_per_s", "tokens a second")])),
        Panel("Peak memory", "GiB", series([("peak_memory_bytes", "peak memory")], 2.0**-30)),
    ]
    others = [key for key in dict.fromkeys(key for entry in log for key in entry) if key not in drawn | NOT_CURVES and not key.endswith("/loss")]
    return panels + [Panel(title_of(key), "", series([(key, title_of(key))])) for key in others] + last


def _series(log: Sequence[Entry], key: str, label: str, scale: float) -> Series:
    points = [(entry["step"], scale * entry[key]) for entry in log if is_number(entry.get(key))]
    return Series(label, tuple(step for step, _ in points), tuple(value for _, value in points))


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_report(folder: Path) -> Path:
    """Write report.html and curves.png into the folder of a stage, or of several stages' folders; returns the page's path.

    Raises NotFoundError when there is no log, MissingExtraError without matplotlib.
    """
    folder = Path(folder)
    stages = [Stage.read(path) for path in _stage_folders(folder)]
    write_whole(folder / "curves.png", draw_curves(_rows(stages)))
    write_whole(folder / "report.html", render_page(folder.absolute().name, stages).encode())
    return folder / "report.html"


def _rows(stages: Sequence[Stage]) -> list[tuple[str, list[Panel]]]:
    """All charts of a stage, three in a row, or the first three of each of several."""
    if len(stages) != 1:
        return [(stage.name, stage.panels()[:3]) for stage in stages]
    panels = stages[0].panels()
    return [("", panels[start : start + 3]) for start in range(0, len(panels), 3)]


def _stage_folders(folder: Path) -> list[Path]:
    """The folder itself, or those in it that have a log, in the order of the stages, then of their numbers."""
    if (folder / "log.jsonl").is_file():
        return [folder]
    found = [path.parent for path in folder.glob("*/log.jsonl")]
    return sorted(found, key=_in_order) or [folder]


def _in_order(folder: Path) -> tuple[int, int, str]:
    order, number = list(STAGE_SETTINGS), re.search(r"\d+$", folder.name)
    return order.index(folder.name) if folder.name in order else len(order), int(number[0]) if number else 0, folder.name


def render_page(title: str, stages: Sequence[Stage]) -> str:
    """The whole page, pictures inside: no script, no network, light and dark as the reader's system is."""
    body = "".join(_section(place, stage) for place, stage in enumerate(stages))
    links = [(f"stage-{place}", stage.name) for place, stage in enumerate(stages)]
    return page(f"{title}: training report", body, heading="Training report", under=title, links=links if len(stages) > 1 else ())


def _section(place: int, stage: Stage) -> str:
    state = {True: "finished", False: "stopped", None: "not finished"}[stage.result.get("finished")]
    charts = "".join(figure(panel) for panel in stage.panels())
    settings = "".join(f"<tr><th>{text(name)}</th><td>{text(shown(value))}</td></tr>" for name, value in stage.settings.items())
    return (
        f'<section id="stage-{place}"><h2>{text(stage.name)} <small>{state}</small></h2>{_facts(stage)}{_table(stage.log)}<div class="charts">{charts}</div>'
        + (f'<details><summary>Settings</summary><table class="settings">{settings}</table></details>' if settings else "")
        + "</section>\n"
    )


def _facts(stage: Stage) -> str:
    """A few numbers, and what became of the rows."""
    log, result = stage.log, stage.result
    losses, speeds, memory = ([entry[key] for entry in log if is_number(entry.get(key))] for key in ("loss", "tokens_per_s", "peak_memory_bytes"))
    facts = {
        "steps": f"{result.get('steps', log[-1]['step'] if log else 0):,}",
        "time": _duration(result.get("seconds")),
        "training loss": f"{losses[0]:.4g} → {losses[-1]:.4g}" if losses else "",
        "held-out loss": number(result.get("eval_loss")),
        "best step": shown(result.get("best_step", "")),
        "tokens predicted": number(result.get("eval_token_accuracy")),
        "rows in full": number(result.get("eval_exact_match")),
        "tokens a second": f"{sorted(speeds)[len(speeds) // 2]:,.0f}" if speeds else "",
        "peak memory": f"{max(memory) / 2**30:.2f} GiB" if memory else "",
    }
    facts |= {title_of(name): number(value) for name, value in result.items() if name.startswith("eval_") and name not in (*NOT_CURVES, *SHOWN)}
    tiles = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts.items() if value)
    counts = result.get("counts")
    said = " · ".join(f"{name.replace('_', ' ')} {shown(value)}" for name, value in counts.items()) if isinstance(counts, dict) else ""
    return f"<dl>{tiles}</dl>" + (f"<p>Data: {text(said)}</p>" if said else "")


def _table(log: Sequence[Entry]) -> str:
    """The rows of `stage_table`, side by side for curriculum stages, chunks, shares and others."""
    rows = stage_table(log)
    return f'<div class="tables">{"".join(_table_of(kind, [row for row in rows if row["kind"] == kind]) for kind in dict.fromkeys(row["kind"] for row in rows))}</div>'


def _table_of(kind: str, rows: Sequence[dict[str, Any]]) -> str:
    lines = "".join(
        f"<tr><th>{text(row['short'])}</th><td>{row['first']:.4f}</td><td>{row['last']:.4f}</td><td>{row['first_step']}–{row['last_step']}</td></tr>" for row in rows
    )
    return f"<table><thead><tr><th>{text(kind)}</th><th>first loss</th><th>last loss</th><th>steps</th></tr></thead><tbody>{lines}</tbody></table>"


def _duration(seconds: Any) -> str:
    if not is_number(seconds):
        return ""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{rest} s"
