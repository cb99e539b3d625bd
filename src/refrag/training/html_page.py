"""Parts of a self-contained page: no script, no network, light and dark as the reader's system is. The training report and `refrag report`."""

import html
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .curves import Panel, colours, draw_inline, short_number


def page(title: str, body: str, *, heading: str, under: str, links: Sequence[tuple[str, str]] = (), style: str = "") -> str:
    """The whole page; `links` are (id, words) of its sections, `style` is added to the common one."""
    nav = "".join(f'<a href="#{text(where)}">{text(words)}</a>' for where, words in links)
    head = f"<header><h1>{text(heading)}</h1><p>{text(under)}</p>{f'<nav>{nav}</nav>' if nav else ''}</header>"
    start = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
    return f'{start}<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}{style}</style></head>\n<body>{head}<main>{body}</main></body></html>\n'


def figure(panel: Panel) -> str:
    """A chart with its title, its unit and the names of its curves."""
    shades = zip(panel.series, colours(panel, "light"), colours(panel, "dark"), strict=True)
    chips = "".join(f'<li><i class="{series.line}" style="--light:{light};--dark:{dark}"></i>{text(series.label)}</li>' for series, light, dark in shades)
    last = "; ".join(f"{series.label} {short_number(series.values[0])} to {short_number(series.values[-1])}" for series in panel.series)
    picture = (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{draw_inline(panel, "dark")}">'
        f'<img src="{draw_inline(panel, "light")}" alt="{text(f"{panel.title} over {panel.over}: {last}")}"></picture>'
    )
    unit = f" <small>{text(panel.unit)}</small>" if panel.unit else ""
    return f"<figure><figcaption>{text(panel.title)}{unit}</figcaption>{picture}{f'<ul>{chips}</ul>' if len(panel.series) > 1 else ''}</figure>"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def text(value: Any) -> str:
    """Safe in HTML."""
    return html.escape(str(value))


def shown(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)


def number(value: Any) -> str:
    """Four digits, or nothing for what is no number."""
    return f"{value:.4g}" if is_number(value) else ""


def is_number(value: Any) -> bool:
    """A finite number, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def title_of(key: str) -> str:
    """`grad_norm` as `Grad norm`."""
    words = key.replace("_", " ").replace("/", ": ")
    return words[:1].upper() + words[1:]


STYLE = """
:root { color-scheme: light dark; --ground: #f9f9f7; --card: #fff; --ink: #0b0b0b; --soft: #5b5a56; --line: #e1e0d9; --link: #1f66bd }
@media (prefers-color-scheme: dark) { :root { --ground: #0d0d0d; --card: #1a1a19; --ink: #f4f3ef; --soft: #b5b3ab; --line: #33322f; --link: #7fb2f2 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 24px 16px 64px; max-width: 1240px; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
h1 { margin: 0; font-size: 26px } h2 { margin: 40px 0 12px; font-size: 20px } small { color: var(--soft); font-size: 13px; font-weight: 400 }
header p { margin: 2px 0 0; color: var(--soft) } nav { display: flex; flex-wrap: wrap; gap: 6px 16px; margin-top: 10px }
a { color: var(--link) } p { color: var(--soft); overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(122px, 1fr)); gap: 10px; margin: 0 0 12px }
dl div, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px }
dt { color: var(--soft); font-size: 13px } dd { margin: 0; font-size: 17px; font-variant-numeric: tabular-nums }
.tables { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 12px 48px; margin: 8px 0 16px; overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 4px 0 4px 16px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; font-weight: 400 }
th:first-child { text-align: left; padding-left: 0 } thead th { color: var(--soft); font-size: 13px }
.settings { margin-top: 8px } .settings td { text-align: left; white-space: normal; overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 12px }
figure { margin: 0 } figcaption { font-weight: 600; margin-bottom: 6px } img { display: block; width: 100%; height: auto }
ul { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 6px 0 0; padding: 0; list-style: none; font-size: 13px; color: var(--soft) }
i { display: inline-block; width: 18px; border-top: 3px solid var(--light); margin-right: 6px; vertical-align: middle }
i.dashed { border-top-style: dashed } i.dotted { border-top-style: dotted }
@media (prefers-color-scheme: dark) { i { border-top-color: var(--dark) } }
details { margin-top: 14px } summary { cursor: pointer; color: var(--link) }
"""
