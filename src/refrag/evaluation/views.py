"""What a page shows of a result of each kind: facts, tables, charts, examples. Nothing here is measured, nothing is drawn: no torch."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..training.curves import Line, Panel, Series
from ..training.html_page import is_number, title_of

Content = Mapping[str, Any]
Cell = Any
"""A number or words; None shows as an empty cell."""


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first of each its name."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class View:
    """What is shown of one result."""

    heading: str
    facts: dict[str, Cell] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    examples: list[Any] = field(default_factory=list)


PAPER_TOKENS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
PAPER = {
    "ttft": {
        8: (1.16, 2.08, 3.91, 6.49, 7.40, 9.21, 11.79, 15.51),
        16: (1.14, 2.16, 3.74, 7.58, 13.80, 16.54, 22.85, 32.99),
        32: (1.13, 2.12, 3.87, 7.25, 16.12, 30.85, 41.02, 63.92),
    },
    "ttft_uncached": {16: (0.75, 1.36, 2.39, 4.22, 6.76, 8.59, 11.67, 16.72)},
    "ttit": {
        8: (1.13, 1.05, 1.05, 0.97, 0.96, 1.03, 1.68, 3.25),
        16: (1.12, 1.07, 1.04, 1.08, 0.91, 1.02, 1.74, 3.05),
        32: (1.12, 1.06, 1.05, 1.08, 1.02, 0.96, 1.72, 3.17),
    },
}
"""Acceleration over LLaMA-2-7B on one A100, batch 1: read off the curves of arXiv 2509.01092 v2, figures 2, 8 and 9 (± 0.5 % of an axis).

Its uncached curve is the same for every k, so only that of k = 16 is taken for measured."""

NAMES = {"cached": "REFRAG, vectors on disk", "memory": "REFRAG, vectors in memory", "uncached": "REFRAG, vectors computed", "full": "plain RAG", "bare": "bare decoder", "generate": "plain generate"}


def view(content: Content) -> View:
    """The view of a result's kind; other kinds, and those whose values are not as expected, as plain tables."""
    kind = str(content.get("kind"))
    try:
        return VIEWS[kind](content) if kind in VIEWS else plain(content)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError):  # written by another version, or by hand
        return plain(content)


# ── speed ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def latency(content: Content) -> View:
    """One context length."""
    work, limits = content["workload"], content.get("limits", {})
    counted = {name: own["flops_counted"] for name, own in content["systems"].items() if own.get("flops_counted")}
    facts = {
        "context tokens": work["context_tokens"],
        "slots": f"{work['prompt_slots']:,} of {work['full_slots']:,}",
        "measured rate": f"{work['compression_rate']:.2f}",
        "KV cache": mib(work["kv_bytes"]),
        "plain RAG ÷ REFRAG": _median(content, "full_over_cached"),
        "causal FLOPs allow": _two(limits.get("full_over_cached")),
        "with the full square of attention": _two(counted["full"] / counted["cached"]) if {"full", "cached"} <= counted.keys() else None,
        "REFRAG ÷ bare decoder": _median(content, "cached_over_bare", 3),
        "decoder": f"{work['decoder']['parameters'] / 1e9:.2f} B, {work['dtype']}, {work['device']}",
    }
    facts |= {f"{name.replace('_', ' ')}, share": f"{100 * value:.1f} %" for name, value in content.get("shares", {}).items()}
    tables = [_systems_table(content["systems"]), _ratio_table(content["ratios"], limits), _stage_table(content["systems"])]
    if "decoding" in content:
        rows = [[NAMES.get(name, name), 1e3 * own["p50_s"], 1e3 * own["p95_s"]] for name, own in content["decoding"]["systems"].items()]
        tables.append(Table(f"Time between tokens ({content['decoding']['new_tokens']} tokens)", ("system", "p50 ms", "p95 ms"), rows))
    return View("Time to first token", facts, tables)


def _systems_table(systems: Mapping[str, Content]) -> Table:
    header = ("system", "p50 ms", "p95 ms", "CPU ms", "slots", "KV cache", "GFLOP", "peak memory")
    rows = [
        [
            NAMES.get(name, name), 1e3 * own["p50_s"], 1e3 * own["p95_s"], 1e3 * own["cpu_median_s"], own.get("slots"), mib(own.get("kv_bytes")),
            own["flops"] / 1e9 if own.get("flops") else None, mib(own.get("peak_gpu_bytes") or own.get("peak_rss_bytes")),
        ]
        for name, own in systems.items()
    ]  # fmt: skip
    return Table("Systems", header, rows)


def _ratio_table(ratios: Mapping[str, Content], limits: Content) -> Table:
    rows = [
        [name.replace("_", " "), interval_words(own), _two(limits.get(name)), own.get("cpu_median"), "yes" if own["steady"] else f"no, {own['rounds']} rounds" if "rounds" in own else "no"]
        for name, own in ratios.items()
    ]
    return Table("Ratios, medians within rounds", ("ratio", "median [95 %]", "FLOPs allow", "by CPU time", "steady"), rows)


def _stage_table(systems: Mapping[str, Content]) -> Table:
    shown = {name: own["stages_s"] for name, own in systems.items() if own.get("stages_s")}
    stages = list(dict.fromkeys(stage for own in shown.values() for stage in own))
    rows = [[stage.removesuffix("_s"), *(1e3 * own[stage] if stage in own else None for own in shown.values())] for stage in stages]
    return Table("Stages, median ms", ("stage", *(NAMES.get(name, name) for name in shown)), rows)


def latency_sweep(content: Content) -> View:
    """Curves over context lengths, on the axes of the paper's figure."""
    points = [point for point in content["points"] if "failed" not in point]
    sizes = sorted({point["chunk_size"] for point in points})
    panels = [_acceleration(points, size) for size in sizes]
    panels += [panel for size in sizes if (panel := _between_tokens(points, size)).series]
    panels.append(_seconds(points, sizes))
    rows = [_sweep_row(point) for point in content["points"]]
    header = ("context", "k", "plain RAG ÷ cached", "÷ computed", "FLOPs allow", "cached ÷ bare", "cached ms", "computed ms", "plain RAG ms", "steady")
    return View("Time to first token over context lengths", {}, [Table("Points", header, rows)], [panel for panel in panels if panel.series])


def _sweep_row(point: Content) -> list[Cell]:
    start = [point["context_tokens"], point["chunk_size"]]
    if "failed" in point:
        return [*start, point["failed"]]
    ratios, systems = point["ratios"], point["systems"]
    words = [interval_words(ratios[name], digits=2) if name in ratios else None for name in ("full_over_cached", "full_over_uncached")]
    bare = interval_words(ratios["cached_over_bare"]) if "cached_over_bare" in ratios else None
    times = [1e3 * systems[name]["p50_s"] if name in systems else None for name in ("cached", "uncached", "full")]
    return [*start, *words, _two(point["limits"]["full_over_cached"]), bare, *times, "yes" if point["steady"] else "no"]


def _acceleration(points: Sequence[Content], size: int) -> Panel:
    curves = [
        _curve("vectors on disk", points, size, lambda point: point["ratios"]["full_over_cached"]["median"], colour=0),
        _curve("vectors computed", points, size, lambda point: point["ratios"]["full_over_uncached"]["median"], colour=1),
        _curve("causal FLOPs allow", points, size, lambda point: point["limits"]["full_over_cached"], line="dotted", colour=0),
    ]
    curves += _paper(("ttft", "ttft_uncached"), size, points) if any(curve.steps for curve in curves[:2]) else []
    return Panel(f"Acceleration to the first token, k = {size}", "times plain RAG", _present(curves), over="context tokens", log="x")


def _paper(names: Sequence[str], size: int, points: Sequence[Content]) -> list[Series]:
    """The paper's curves over the lengths that were measured, and one beyond."""
    longest = 2 * max(point["context_tokens"] for point in points)
    labels = {"ttft": "paper (7B, A100), cached", "ttft_uncached": "paper (7B, A100), not cached", "ttit": "paper (7B, A100)"}
    curves = []
    for place, name in enumerate(names):
        pairs = [(tokens, value) for tokens, value in zip(PAPER_TOKENS, PAPER[name].get(size, ()), strict=False) if tokens <= longest]
        curves.append(Series(labels[name], tuple(tokens for tokens, _ in pairs), tuple(value for _, value in pairs), "dashed", place))
    return curves


def _between_tokens(points: Sequence[Content], size: int) -> Panel:
    own = _curve("vectors on disk", points, size, lambda point: point["ratios"]["ttit_full_over_cached"]["median"], colour=0)
    return Panel(f"Acceleration between tokens, k = {size}", "times plain RAG", _present([own, *_paper(("ttit",), size, points)]) if own.steps else (), over="context tokens", log="x")


def _seconds(points: Sequence[Content], sizes: Sequence[int]) -> Panel:
    curves = [_curve("plain RAG", points, sizes[0], lambda point: point["systems"]["full"]["p50_s"], colour=4)] if sizes else []
    curves += [_curve(f"k = {size}", points, size, lambda point: point["systems"]["cached"]["p50_s"], colour=place % 4) for place, size in enumerate(sizes)]
    return Panel("Time to first token, vectors on disk", "seconds", _present(curves), over="context tokens", log="xy")


def _curve(label: str, points: Iterable[Content], size: int, value: Callable[[Content], float], *, line: Line = "solid", colour: int | None = None) -> Series:
    """Over the context lengths of one chunk size; points without that value are left out."""
    pairs = []
    for point in points:
        try:
            pairs += [(point["context_tokens"], value(point))] if point["chunk_size"] == size else []
        except KeyError:
            continue
    pairs.sort()
    return Series(label, tuple(step for step, _ in pairs), tuple(own for _, own in pairs), line, colour)


def _present(curves: Iterable[Series]) -> tuple[Series, ...]:
    return tuple(curve for curve in curves if curve.steps)


def throughput(content: Content) -> View:
    """Tokens a second over batch sizes."""
    points = [point for point in content["points"] if "failed" not in point]
    sizes = tuple(point["batch_size"] for point in points)
    curves = [Series(NAMES[name], sizes, tuple(point["systems"][name]["tokens_per_s"] for point in points)) for name in ("cached", "full")]
    rows: list[list[Cell]] = []
    for point in content["points"]:
        if "failed" in point:
            rows.append([point["batch_size"], point["failed"]])
            continue
        cached, full, ratio = point["systems"]["cached"], point["systems"]["full"], point["ratios"]["full_over_cached"]
        rows.append([point["batch_size"], cached["tokens_per_s"], full["tokens_per_s"], interval_words(ratio, digits=2), mib(cached["kv_bytes"]), mib(full["kv_bytes"]), "yes" if ratio["steady"] else "no"])
    header = ("batch", "REFRAG tokens/s", "plain RAG tokens/s", "ratio [95 %]", "REFRAG KV cache", "plain RAG KV cache", "steady")
    panel = Panel("Throughput", "tokens a second", _present(curves), over="requests in a batch", log="x")
    return View("Throughput", {}, [Table("Batches", header, rows)], [panel] if panel.series else [])


def indexing(content: Content) -> View:
    """Indexing against the encoder's own forward."""
    speed = content["speed"]
    facts = {
        "chunks a second": f"{speed['add_chunks_per_s']:,.1f}",
        "of the encoder's own forward": interval_words(speed["over_encoder_forward"]),
        "of both encoders": interval_words(speed["over_both_encoders"]),
        "best batch": speed["best_batch_size"],
    }
    facts |= {f"peak memory, {int(count):,} passages": mib(peak) for count, peak in content.get("peak_rss_bytes", {}).items()}
    rates = speed["forward_chunks_per_s"].items()
    return View("Indexing", facts, [Table("The encoder's forward alone", ("batch", "chunks a second"), [[int(size), rate] for size, rate in rates])])


def training(content: Content) -> View:
    """Steps and memory over context lengths, with and without gradient checkpointing."""
    points = [point for point in content["points"] if "failed" not in point]

    def curve(mode: bool, value: Callable[[Content], float]) -> Series:
        own = [point for point in points if point["gradient_checkpointing"] is mode]
        return Series("with checkpointing" if mode else "without", tuple(point["context_tokens"] for point in own), tuple(value(point) for point in own), colour=int(mode))

    def panel(title: str, unit: str, value: Callable[[Content], float]) -> Panel:
        return Panel(title, unit, _present([curve(False, value), curve(True, value)]), over="context tokens", log="x")

    panels = [
        panel("Training step", "seconds", lambda point: point["systems"]["step"]["p50_s"]),
        panel("Peak memory of training", "GiB", lambda point: (point["peak_memory_bytes"] or 0) / 2**30),
        panel("Step ÷ bare decoder and encoder", "ratio", lambda point: point["ratios"]["step_over_parts"]["median"]),
    ]
    rows: list[list[Cell]] = []
    for point in content["points"]:
        start = [point["context_tokens"], "yes" if point["gradient_checkpointing"] else "no"]
        if "failed" in point:
            rows.append([*start, point["failed"]])
            continue
        seconds = [1e3 * point["systems"][name]["p50_s"] for name in ("step", "decoder", "encoder", "optimizer")]
        ratio = point["ratios"]["step_over_parts"]
        rows.append([*start, *seconds, interval_words(ratio), mib(point["peak_memory_bytes"]), "yes" if ratio["steady"] else "no"])
    header = ("context", "checkpointing", "step ms", "decoder ms", "encoder ms", "optimizer ms", "step ÷ parts [95 %]", "peak memory", "steady")
    return View("Training", {}, [Table("Points", header, rows)], [own for own in panels if own.series])


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def quality(content: Content) -> View:
    """Answers: a row a system, quality against slots and against time with the front of those that nothing beats, examples."""
    own = content["systems"]
    systems = dict(own) if isinstance(own, Mapping) else {str(one.get("system", one.get("name", number))): one for number, one in enumerate(own)}
    rows = [_flat(values) for values in systems.values()]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table("Systems", ("system", *map(title_of, columns)), [[name, *(row.get(column) for column in columns)] for name, row in zip(systems, rows, strict=True)])
    panels = [panel for cost, over, scale in (("ttft", "milliseconds to first token", 1e3), ("slots", "slots of the prompt", 1.0)) if (panel := _against(systems, cost, over, scale))]
    return View("Answers", _facts(content), [table, *_differences(systems, content.get("comparisons", {}))], panels, list(content.get("examples", [])))


def _differences(systems: Mapping[str, Content], comparisons: Content) -> list[Table]:
    """Paired differences: to plain RAG over the same passages, and to the best way without compression that costs no more."""
    metrics = ("exact_match", "f1", "match", "rougeL")
    header = [*map(title_of, metrics)]

    def gaps(own: Content) -> list[Cell]:
        return [_with_interval(own[name]) if own.get(name) else None for name in metrics]

    rows = [[name, *gaps(own["against_plain"])] for name, own in systems.items() if own.get("against_plain")]
    tables = [Table("Less plain RAG, paired", ("system", *header), rows)] if rows else []
    for key, cost, scale in (("equal_slots", "slots", 1), ("equal_ttft", "ms to the first token", 1000)):
        pairs = [[own["system"], own["against"], *(scale * own[name] if own.get(name) else None for name in ("cost", "cost_of_other")), *gaps(own)] for own in comparisons.get(key, ())]
        if pairs:
            tables.append(Table(f"Less the best without compression that takes no more {cost}, paired", ("system", "against", cost, "of the other", *header), pairs))
    return tables


def cells(content: Content) -> View:
    """Answers in cells (numbers of passages, of turns): a row a cell and system, exact match over the first of a cell's numbers."""
    rows: list[list[Cell]] = []
    curves: dict[str, dict[str, list[tuple[int | float, int | float]]]] = {}
    names = [name for name, value in content["cells"][0].items() if is_number(value)]
    for cell in content["cells"]:
        numbers = [cell[name] for name in names]
        group = ", ".join(f"{title_of(name).lower()} {value}" for name, value in zip(names[1:], numbers[1:], strict=True))
        for system, own in cell["systems"].items():
            score, against = own["metrics"]["exact_match"], own["against_plain"].get("exact_match")
            rows.append([*numbers, system, _with_interval(score), _with_interval(against) if against else None, own["compression_rate"], own["prompt_slots"], own["num_failed"] or None])
            curves.setdefault(group, {}).setdefault(system, []).append((numbers[0], score["mean"]))
    header = (*map(title_of, names), "system", "exact match [95 %]", "less plain RAG [95 %]", "rate", "slots", "failed")
    panels = [
        Panel(f"Exact match{f', {group}' if group else ''}", "share of questions", tuple(_series(name, pairs) for name, pairs in own.items()), over=title_of(names[0]).lower())
        for group, own in curves.items()
    ]
    return View("Answers by " + " and ".join(title_of(name).lower() for name in names), _facts(content), [Table("Cells", header, rows)], panels)


def _series(label: str, pairs: Iterable[tuple[int | float, int | float]]) -> Series:
    ordered = sorted(pairs)
    return Series(label, tuple(x for x, _ in ordered), tuple(y for _, y in ordered))


def _flat(values: Content) -> dict[str, Cell]:
    """A system's numbers with their intervals, those of `metrics` first."""
    flat: dict[str, Cell] = {}
    for name, value in {**values.get("metrics", {}), **{name: value for name, value in values.items() if name != "metrics"}}.items():
        if isinstance(value, Mapping) and _middle(value) is not None:
            flat[name] = _with_interval(value)
        elif is_number(value) or isinstance(value, str):
            flat[name] = value
    return flat


def _with_interval(value: Content) -> str:
    low, high = value.get("low"), value.get("high")
    middle = f"{_middle(value):.3f}"
    return f"{middle} [{low:.3f}, {high:.3f}]" if is_number(low) and is_number(high) else middle


def _middle(value: Any) -> float | None:
    """A number, or the mean or median of an interval."""
    if isinstance(value, Mapping):
        value = value.get("mean", value.get("median"))
    return float(value) if is_number(value) else None


def _against(systems: Mapping[str, Content], cost: str, over: str, scale: float) -> Panel | None:
    """F1 (else exact match) against a cost, a point a system, and the front."""
    points = []
    for name, own in systems.items():
        scores = {**own, **own.get("metrics", {})}
        score = next((found for key in ("f1", "exact_match", "em") if (found := _middle(scores.get(key))) is not None), None)
        price = next((found for key in (cost, f"{cost}_s", f"prompt_{cost}") if (found := _middle(own.get(key))) is not None), None)
        if score is not None and price is not None:
            points.append((scale * price, score, name))
    if len(points) < 2:
        return None
    front = sorted((price, score) for price, score, _ in points if not any(other[0] <= price and other[1] >= score and other[:2] != (price, score) for other in points))
    series = [Series(name, (price,), (score,)) for price, score, name in sorted(points)]
    series.append(Series("nothing is better and cheaper", tuple(price for price, _ in front), tuple(score for _, score in front), "dashed"))
    return Panel(f"Quality against {'time' if cost == 'ttft' else cost}", "F1", tuple(series), over=over)


# ── any other kind ───────────────────────────────────────────────────────────────────────────────────────────────────


def plain(content: Content) -> View:
    """Numbers as facts, and a table for every group of things that have the same fields."""
    tables: list[Table] = []
    body = {name: value for name, value in content.items() if name not in ("schema", "kind", "settings", "provenance", "examples")}
    _collect(body, "", tables)
    examples = content.get("examples", [])
    return View(title_of(str(content.get("kind", "result"))).replace("-", " "), _facts(content), tables, [], examples if isinstance(examples, list) else [])


def _facts(content: Content) -> dict[str, Cell]:
    skipped = ("schema", "kind", "settings", "provenance")
    return {name.replace("_", " "): value for name, value in content.items() if name not in skipped and (is_number(value) or isinstance(value, str))}


def _collect(value: Any, title: str, tables: list[Table]) -> None:
    """Depth first: a group of things with fields becomes a table, fields within fields as columns of their own; a thing alone, two columns."""
    named = [(name, _fields(row)) for name, row in _rows_of(value)]
    if any(_is_cell(own) for _, row in _rows_of(value) for own in row.values()):
        columns = list(dict.fromkeys(name for _, row in named for name in row))
        tables.append(Table(title, ("", *map(title_of, columns)), [[name, *(row.get(column) for column in columns)] for name, row in named]))
        return
    if not isinstance(value, Mapping):
        return
    if title and not named and any(map(_is_cell, value.values())):
        tables.append(Table(title, ("", ""), [[str(name).replace("_", " "), _cell(str(name), own)] for name, own in value.items() if _is_cell(own)]))
    for name, own in value.items():
        if not _is_cell(own):
            _collect(own, f"{title}: {name}".removeprefix(": ").replace("_", " "), tables)


def _fields(row: Content, start: str = "") -> dict[str, Cell]:
    """Numbers and words by name; of nested ones the names are joined."""
    fields: dict[str, Cell] = {}
    for name, value in row.items():
        if _is_cell(value):
            fields[f"{start}{name}"] = _cell(str(name), value)
        elif isinstance(value, Mapping):
            fields |= _fields(value, f"{start}{name}: ")
    return fields


def _rows_of(value: Any) -> list[tuple[str, Content]]:
    """(name, fields) of each of a group, or nothing where the value is no group."""
    if isinstance(value, Mapping) and len(value) > 1 and all(isinstance(own, Mapping) and not _is_cell(own) for own in value.values()):
        return [(str(name), own) for name, own in value.items()]
    if isinstance(value, list) and value and all(isinstance(own, Mapping) for own in value):
        return [(str(number), own) for number, own in enumerate(value, 1)]
    return []


def _is_cell(value: Any) -> bool:
    """A number, words, an interval, or a pair of numbers."""
    if isinstance(value, Mapping):
        return _middle(value) is not None and "low" in value
    if isinstance(value, list):
        return len(value) == 2 and all(map(is_number, value))
    return value is None or isinstance(value, str | bool) or is_number(value)


def _cell(name: str, value: Any) -> Cell:
    if name.endswith("bytes") and is_number(value):
        return mib(value)
    if isinstance(value, Mapping):
        return _with_interval(value)
    if isinstance(value, list):
        return f"[{value[0]:g}, {value[1]:g}]"
    return value


def interval_words(values: Mapping[str, Any], *, digits: int = 3) -> str:
    """A median with its interval, `1.050 [1.040, 1.060]`; an end that too few values leave open is said to be."""
    low, high = ("open" if values[end] is None or not math.isfinite(values[end]) else f"{values[end]:.{digits}f}" for end in ("low", "high"))
    return f"{values['median']:.{digits}f} [{low}, {high}]"


def _median(content: Content, name: str, digits: int = 2) -> str | None:
    own = content["ratios"].get(name)
    return None if own is None else interval_words(own, digits=digits)


def _two(value: int | float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def mib(value: int | float | None) -> str | None:
    """Bytes in MiB, or in GiB from 10 GiB on."""
    if value is None:
        return None
    return f"{value / 2**20:,.1f} MiB" if value < 10 * 2**30 else f"{value / 2**30:,.1f} GiB"


VIEWS: dict[str, Callable[[Content], View]] = {
    "latency": latency,
    "latency-sweep": latency_sweep,
    "throughput": throughput,
    "indexing": indexing,
    "training": training,
    "qa": quality,
    "passages": cells,
    "conversations": cells,
}
