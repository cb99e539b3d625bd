"""Results files as one page that needs nothing else: tables, charts, examples with their traces, and where every number comes from."""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, NotFoundError
from ..training.curves import draw_curves
from ..training.html_page import figure, is_number, page, shown, text, write_whole
from .provenance import read_result
from .settings import check_out
from .views import Table, View, view

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """A results file that was read."""

    name: str
    content: dict[str, Any]
    view: View


def write_report(paths: Sequence[Path], out: Path, *, png: Path | None = None) -> tuple[int, list[str]]:
    """Write the page, and with `png` every chart into that folder; returns how many results it shows, and why others are left out.

    Raises NotFoundError where nothing is, InputError when no file can be shown, MissingExtraError without matplotlib.
    """
    check_out(out, name="report.html")
    results, refused = read_all(paths)
    if not results:
        raise InputError(f"There is no result to show: {refused[0]}")
    charts = {f"{own.name}-{_slug(panel.title)}.png": panel for own in results for panel in own.view.panels}
    rendered = render(results, refused).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, rendered)
    if png is not None:
        png.mkdir(parents=True, exist_ok=True)
        for name, panel in charts.items():
            write_whole(png / name, draw_curves([("", [panel])]))
    return len(results), refused


def read_all(paths: Sequence[Path]) -> tuple[list[Result], list[str]]:
    """The results in files and folders, in the order of their names, and a sentence for each file that is none."""
    results, refused = [], []
    for path in _files(paths):
        try:
            content = read_result(path)
        except InputError as error:
            refused.append(str(error))
            continue
        results.append(Result(path.stem, content, view(content)))
    return results, refused


def _files(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise NotFoundError(f"There is no file or folder {path}: check the path.")
        found += sorted(path.rglob("*.json")) if path.is_dir() else [path]
    if not paths:
        raise InputError("Name the results to show, files or folders:  refrag report results/")
    if not found:
        raise NotFoundError(f"There is no results file in {' or '.join(map(str, paths))}: measure one with  refrag bench … --out results/NAME.json")
    return list(dict.fromkeys(found))


def render(results: Sequence[Result], refused: Sequence[str] = ()) -> str:
    """The page's text."""
    body = "".join(_section(own) for own in results)
    if refused:
        body += f'<section id="left-out"><h2>Left out</h2><ul class="plain">{"".join(f"<li>{text(reason)}</li>" for reason in refused)}</ul></section>'
    links = [(_slug(own.name), own.name) for own in results]
    under = f"{len(results)} results. Under each: the command, the machine and the versions that gave its numbers."
    return page("refrag: results", body, heading="Results", under=under, links=links if len(results) > 1 else (), style=STYLE)


def _section(own: Result) -> str:
    charts = "".join(figure(panel) for panel in own.view.panels)
    return (
        f'<section id="{_slug(own.name)}"><h2>{text(own.view.heading)} <small>{text(own.name)}</small></h2>'
        + _facts(own.view.facts)
        + (f'<div class="charts">{charts}</div>' if charts else "")
        + f'<div class="tables">{"".join(map(_table, own.view.tables))}</div>'
        + "".join(_example(example) for example in own.view.examples if isinstance(example, Mapping))
        + _provenance(own)
        + "</section>\n"
    )


def _facts(facts: Mapping[str, Any]) -> str:
    tiles = "".join(f"<div><dt>{text(name)}</dt><dd>{text(_words(value))}</dd></div>" for name, value in facts.items() if value not in (None, ""))
    return f"<dl>{tiles}</dl>" if tiles else ""


def _table(table: Table) -> str:
    """Columns without any value are left out."""
    if not table.rows:
        return ""
    whole = [row for row in table.rows if len(row) == len(table.header)]
    kept = [place for place in range(len(table.header)) if place == 0 or not whole or any(row[place] not in (None, "") for row in whole)]
    head = "".join(f"<th>{text(table.header[place])}</th>" for place in kept)
    rows = "".join(_row([row[place] for place in kept] if len(row) == len(table.header) else row, len(kept)) for row in table.rows)
    return f'<div class="scroll" tabindex="0"><table><caption>{text(table.title)}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _row(row: Sequence[Any], width: int) -> str:
    """A row that is too short ends in a reason, which takes the rest of the columns."""
    cells = [f"<th>{text(_words(row[0]))}</th>", *(f"<td{LONG if isinstance(cell, str) and len(cell) > 28 else ''}>{text(_words(cell))}</td>" for cell in row[1:])]
    if len(row) < width:
        cells[-1] = f'<td class="failed" colspan="{width - len(row) + 1}">{text(_words(row[-1]))}</td>'
    return f"<tr>{''.join(cells)}</tr>"


def _words(value: Any) -> str:
    """A cell: numbers with a sensible number of digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if is_number(value):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    return str(value)


# ── examples ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _example(example: Mapping[str, Any]) -> str:
    """A question, what each system said, and what it read: expanded parts are marked."""
    expected = example.get("answers", example.get("gold", example.get("answer", "")))
    expected = ", ".join(map(str, expected)) if isinstance(expected, list) else str(expected)
    systems, passages = example.get("systems"), example.get("passages")
    said = systems if isinstance(systems, Mapping) else {str(example.get("system", "answer")): example}
    texts = {str(own.get("id")): own for own in passages if isinstance(own, Mapping)} if isinstance(passages, list) else {}
    parts = "".join(_said(str(name), own, texts) for name, own in said.items() if isinstance(own, Mapping))
    return f'<details class="example"><summary>{text(example.get("question", "example"))}</summary><p>Expected: {text(expected)}</p>{parts}</details>'


def _said(name: str, own: Mapping[str, Any], passages: Mapping[str, Mapping[str, Any]]) -> str:
    answer = own.get("text", own.get("prediction", own.get("answer", "")))
    trace = own.get("trace")
    return f"<h3>{text(name)}: {text(answer)}</h3>" + (_trace(trace, passages) if isinstance(trace, list) else "")


def _trace(trace: Iterable[Any], passages: Mapping[str, Mapping[str, Any]]) -> str:
    """The passages put together from their chunks; a character that two chunks share is shown once.

    A chunk has its `text`, or else `start` and `end` in the text of its passage.
    """
    lines: dict[str, list[str]] = {}
    titles: dict[str, str] = {}
    ends: dict[str, int] = {}
    for chunk in trace:
        if not isinstance(chunk, Mapping):
            continue
        name = str(chunk.get("passage_id", ""))
        passage = passages.get(name, {})
        start, end = (int(place) if is_number(place := chunk.get(key)) else 0 for key in ("start", "end"))
        own = chunk.get("text", str(passage.get("text", ""))[start:end])
        own = str(own)[max(ends.get(name, 0) - start, 0) :] if end else str(own)
        ends[name] = max(ends.get(name, 0), end)
        titles.setdefault(name, str(chunk.get("title") or passage.get("title") or name))
        score = f' title="score {chunk["score"]:.3g}"' if is_number(chunk.get("score")) else ""
        tag = "mark" if chunk.get("expanded") else "span"
        lines.setdefault(name, []).append(f"<{tag}{score}>{text(own)}</{tag}>")
    return "".join(f'<p class="trace"><b>{text(titles[name])}</b> {"".join(parts)}</p>' for name, parts in lines.items())


# ── where numbers come from ──────────────────────────────────────────────────────────────────────────────────────────


def _provenance(own: Result) -> str:
    """One line that is always there, and everything behind it."""
    source = own.content.get("provenance")
    source = source if isinstance(source, Mapping) else {}
    machine = source.get("machine")
    machine = machine if isinstance(machine, Mapping) else {}
    where = machine.get("gpu") or machine.get("processor")
    line = [str(part) for part in (source.get("date"), f"commit {source['commit']}" if source.get("commit") else None, where) if part]
    rows = {**_flat(source), **_flat({"settings": own.content.get("settings", {})})}
    cells = "".join(f"<tr><th>{text(name)}</th><td>{text(value if isinstance(value, str) else shown(value))}</td></tr>" for name, value in rows.items())
    command = f"<code>{text(source['command'])}</code>" if source.get("command") else "Nobody noted the command."
    return (
        f'<div class="source"><p>{command}</p><p>{text(" · ".join(line))}</p>'
        f'<details><summary>Provenance of {text(own.name)}</summary><table class="settings">{cells}</table></details></div>'
    )


def _flat(value: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    """Nested names joined by dots."""
    flat: dict[str, Any] = {}
    for name, own in value.items():
        flat |= _flat(own, f"{start}{name}.") if isinstance(own, Mapping) and own else {f"{start}{name}": own if not isinstance(own, list | dict) else json.dumps(own)}
    return flat


def _slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "result"


LONG = ' class="long"'

STYLE = """
section { border-top: 1px solid var(--line); margin-top: 32px } section:first-child { border-top: 0; margin-top: 0 }
.tables { overflow-x: visible } .scroll { overflow-x: auto; max-width: 100%; margin: 6px 0 } td.long { text-align: left; white-space: normal; min-width: 200px } caption { text-align: left; font-weight: 600; padding-bottom: 4px; white-space: nowrap }
tbody th { color: var(--ink) } .failed { color: var(--soft); font-style: italic; text-align: left; white-space: normal }
dl { grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)) } .charts { grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)) } dd { overflow-wrap: anywhere }
ul.plain { display: block; list-style: disc; padding-left: 20px } ul.plain li { overflow-wrap: anywhere }
code { font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; color: var(--ink) }
.source p { margin: 6px 0 0; font-size: 13px } .source { margin-top: 12px }
.example { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 8px 12px } h3 { font-size: 15px; margin: 10px 0 4px }
.trace { margin: 4px 0; font-size: 14px } .trace b { color: var(--ink) } .trace span { color: var(--soft) }
mark { background: var(--mark); color: var(--ink); border-radius: 3px } :root { --mark: #ffe08a }
@media (prefers-color-scheme: dark) { :root { --mark: #5c4a10 } }
@media (max-width: 480px) { .settings, .settings tbody, .settings tr, .settings th, .settings td { display: block; padding-left: 0; text-align: left; white-space: normal } .settings th { border: 0; color: var(--soft); font-size: 13px; padding-bottom: 0 } }
"""
