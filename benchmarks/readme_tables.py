"""Writes README's tables from the files under results/:  python benchmarks/readme_tables.py  (with --check: only compares)."""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def demo() -> list[str]:
    """Exact match of every system on the almanac."""
    content = json.loads((ROOT / "results" / "almanac.json").read_text())
    forms = json.loads((ROOT / "results" / "almanac-forms.json").read_text())
    count = forms["settings"]["num_questions"]
    lines = [f"| system | all (95 %) | one fact | two hops | no answer | unseen forms ({count}) | slots | rate |", "|---|---|---|---|---|---|---|---|"]
    for name, row in content["splits"]["held-out"].items():
        low, high = row["interval"]
        kinds = " | ".join(f"{row['by_kind'][kind]:.2f}" for kind in ("one-hop", "two-hop", "unanswerable"))
        other = forms["splits"]["held-out-forms"][name]["exact_match"]
        lines.append(f"| {name} | {row['exact_match']:.3f} ({low:.3f}–{high:.3f}) | {kinds} | {other:.2f} | {row['prompt_slots']:.0f} | {row['compression_rate']:.2f} |")
    lines += ["", "`python benchmarks/almanac.py --splits held-out` → `results/almanac.json`; unseen forms: `--splits held-out-forms --num-questions 300` → `results/almanac-forms.json`"]
    return [*lines, "", ranked(), "", long_passages()]


def ranked() -> str:
    """The strongest plain rival: the passages most similar to the question first, as many as fit."""
    content = json.loads((ROOT / "results" / "qa-almanac-ranked.json").read_text())
    systems = content["systems"]
    top, cut, learned = (systems[name] for name in ("plain-top2", "truncated@0.065", "learned@0.065"))
    unranked = json.loads((ROOT / "results" / "qa-almanac.json").read_text())["systems"]["learned@0.065"]
    pruned = json.loads((ROOT / "results" / "qa-kvpress.json").read_text())["systems"]
    more = next(own["exact_match"] for own in content["comparisons"]["equal_slots"] if own["system"] == "learned@0.065")

    def score(system: dict, kind: str | None = None) -> str:
        return f"{system['by_kind'][kind]['exact_match']:.2f}" if kind else f"{system['metrics']['exact_match']['mean']:.3f}"

    return (
        f"At equal slots, the passages ranked by similarity to the question: plain RAG with the first two {score(top)} ({top['prompt_slots']:.0f} slots), truncation {score(cut)}, **learned policy {score(learned)}** "
        f"({learned['prompt_slots']:.0f} slots; {more['mean']:+.3f} [{more['low']:.3f}, {more['high']:.3f}]). On one fact the three are {score(top, 'one-hop')}, {score(cut, 'one-hop')} and {score(learned, 'one-hop')}: what is gained is "
        f"two hops, {score(top, 'two-hop')}, {score(cut, 'two-hop')} and {score(learned, 'two-hop')}. `refrag eval qa --data almanac --rank …` → `results/qa-almanac-ranked.json`. "
        f"KV pruning of plain RAG's prompts (in no order; the policy there {score(unranked)}) to as many pairs: expected attention {score(pruned['kvpress-expected-attention@0.25'])}, SnapKV {score(pruned['kvpress-snapkv@0.25'])} "
        "(`benchmarks/peers/kvpress_qa.py` → `results/qa-kvpress.json`)"
    )


def long_passages() -> str:
    """The same with long passages and larger chunks, paired with plain RAG."""
    content = json.loads((ROOT / "results" / "qa-almanac-long.json").read_text())
    systems = content["systems"]
    plain, none, learned = (systems[name] for name in ("plain", "none", "learned@0.028"))
    score = {name: own["metrics"]["exact_match"]["mean"] for name, own in systems.items()}
    less = learned["against_plain"]["exact_match"]
    return (
        f"Passages of 90 to 150 words, the same weights with chunks of {content['model']['chunk_size']}: plain RAG {score['plain']:.3f} ({plain['prompt_slots']:,.0f} slots), none expanded "
        f"{score['none']:.3f} at a rate of {none['compression_rate']:.1f}, **learned policy {score['learned@0.028']:.3f} at {learned['compression_rate']:.1f}** ({learned['prompt_slots']:.0f} slots; {less['mean']:+.3f} "
        f"[{less['low']:.3f}, {less['high']:.3f}] against plain RAG), truncation to its slots {score['truncated@0.028']:.3f} (of passages in random order). "
        "`refrag eval qa --data almanac-long --chunk-size 16 …` → `results/qa-almanac-long.json`"
    )


def latency() -> list[str]:
    """Time to first token from stored vectors against the bare decoder and plain RAG."""
    path = ROOT / "results" / "latency-llama-3.2-1b.json"
    content = json.loads(path.read_text())
    work, systems, ratios = content["workload"], content["systems"], content["ratios"]
    lines = ["| system | slots | p50 s | ratio, median [95 %] |", "|---|---|---|---|"]
    shown = {"full": "full_over_cached", "uncached": "full_over_uncached", "cached": "cached_over_bare", "bare": None}
    words = {"full_over_cached": "÷ cached", "full_over_uncached": "plain RAG ÷ this", "cached_over_bare": "÷ bare"}
    for name, ratio in shown.items():
        slots = work["full_slots"] if name == "full" else work["prompt_slots"]
        value = ratios.get(ratio or "")
        said = f"{words[str(ratio)]} {value['median']:.2f} [{value['low']:.2f}, {value['high']:.2f}]" if value else ""
        lines.append(f"| {name} | {slots:,} | {systems[name]['p50_s']:.2f} | {said} |")
    return [*lines, "", f"{content['rounds']} rounds{'' if content['steady'] else ', not steady'}; `{content['provenance']['command']}` → `results/{path.name}`"]


def index() -> list[str]:
    """Recall of the gold paragraph on SQuAD, and the speed of indexing."""
    content = json.loads((ROOT / "results" / "squad_recall.json").read_text())
    recall = ", ".join(f"{mode} {row['recall@8']:.3f} (MRR {row['mrr']:.3f})" for mode, row in content["modes"].items())
    lines = [f"- Recall@8 of the gold paragraph on SQuAD dev: {recall}. `python benchmarks/squad_recall.py` → `results/squad_recall.json`"]
    for name in ("roberta-large", "roberta-base"):
        path = ROOT / "results" / f"indexing-{name}.json"
        speed = json.loads(path.read_text())
        alone, both = ("{median:.2f} [{low:.2f}, {high:.2f}]".format(**speed["speed"][key]) for key in ("over_encoder_forward", "over_both_encoders"))
        lines.append(f"- Indexing, {name}: {alone} of the encoder's own best forward, {both} of it and the retrieval encoder's together → `results/{path.name}`")
    return lines


TABLES = {"demo": demo, "latency": latency, "index": index}


def written(readme: str) -> str:
    """README with every table made anew; one whose results file is missing says so."""
    for name, make in TABLES.items():
        try:
            lines = make()
        except FileNotFoundError as error:
            lines = [f"*not measured yet ({Path(str(error.filename)).name})*"]
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- /table -->)", re.DOTALL)
        readme = pattern.sub(lambda found, lines=lines: found[1] + "\n".join(lines) + "\n" + found[2], readme)
    return readme


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = written(old)
    if not parser.parse_args().check:
        path.write_text(new, encoding="utf-8")
    elif new != old:
        print("README's tables differ from results/: run  python benchmarks/readme_tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
