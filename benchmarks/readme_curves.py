"""Draws README's two curves from results files:  python benchmarks/readme_curves.py  → docs/pictures/quality.png, docs/pictures/loss.png

Answer quality against the measured compression rate (results/selection.json), and loss by stage with and without what the paper says each
stage needs (results/ablations.json).
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHOWN = {
    "its own policy": "bundled policy (sees the question)", "aware-scratch": "RL, sees the question", "blind-scratch": "RL, question-blind (the paper's)",
    "perplexity": "perplexity, hardest first", "similarity": "similarity to the question", "random": "random", "perplexity-low": "perplexity, easiest first",
}  # fmt: skip


def quality(figure: Any) -> None:
    """Exact match and log-perplexity of every rule at its measured rates; what plain RAG has as a line."""
    table = json.loads((ROOT / "results" / "selection.json").read_text())["table"]
    for axes, name, label in zip(figure.subplots(1, 2), ("exact_match", "log_perplexity"), ("exact match", "log-perplexity (nats a token)"), strict=True):
        for rule, words in SHOWN.items():
            rows = [table["none@0"], *(row for key, row in table.items() if key.startswith(f"{rule}@"))]
            axes.plot([row["compression_rate"] for row in rows], [row[name] for row in rows], marker="o", markersize=3, label=words)
        axes.axhline(table["all@0"][name], color="black", linestyle=":", label="plain RAG (rate 1)")
        axes.set_xlabel("measured compression rate")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)


def loss(figure: Any) -> None:
    """Training loss of the arms of both ablations, one line a seed, and where the held-out documents end."""
    content = json.loads((ROOT / "results" / "ablations.json").read_text())
    left, right = figure.subplots(1, 2)
    names = {
        "reconstruction/paper": (left, "C0", "curriculum 1, 2, 4, 8 chunks"), "reconstruction/none": (left, "C1", "8 chunks from the start"),
        "cpt/after": (right, "C0", "after reconstruction"), "cpt/fresh": (right, "C1", "without it"),
    }  # fmt: skip
    for arm, (axes, color, words) in names.items():
        label = f"{words}: held out {content['table'][arm]['log_perplexity']:.2f}"
        for number, run in enumerate(run for name, run in content["runs"].items() if name.rpartition("/")[0] == arm):
            axes.plot(*zip(*run["curve"], strict=True), color=color, alpha=0.7, label=None if number else label)
    for axes, title in ((left, "reconstruction"), (right, "continual pre-training")):
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("training loss (nats a token)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)


def main() -> None:
    from matplotlib.figure import Figure

    folder = ROOT / "docs" / "pictures"
    folder.mkdir(exist_ok=True)
    for draw in (quality, loss):
        figure = Figure(figsize=(10, 3.2), layout="constrained")
        draw(figure)
        figure.savefig(folder / f"{draw.__name__}.png", dpi=110)


if __name__ == "__main__":
    main()
