"""Answers of the bundled model with 1, 4, 8, 16 and 32 retrieved passages, by a strong and a weak retriever.

    python benchmarks/passages.py --retriever strong --out results/passages-strong.json
    python benchmarks/passages.py --retriever weak --out results/passages-weak.json

One index of all questions' passages; the systems read the same passages. The weak retriever draws at random among the best `--weak-depth` (the paper's second setting;
its 200 stand beside millions of passages, here 64 beside 8,000). The table is written after every cell.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from refrag.config import BUNDLED_MODEL
from refrag.demo.almanac import evaluation_rows
from refrag.engine import Refrag
from refrag.evaluation.provenance import result, write_result
from refrag.evaluation.qa import run
from refrag.evaluation.questions import searched_index, take_questions
from refrag.evaluation.tasks import QaSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=BUNDLED_MODEL)
    parser.add_argument("--retriever", choices=["strong", "weak"], default="strong")
    parser.add_argument("--weak-depth", type=int, default=64)
    parser.add_argument("--num-questions", type=int, default=1000)
    parser.add_argument("--num-passages", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--systems", nargs="+", default=["none", "learned@0.1"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/passages-strong.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = QaSettings(
        data=("almanac",), limit=args.num_questions, pool=True, retriever=args.retriever, weak_depth=args.weak_depth, systems=tuple(args.systems), timed_requests=0, num_examples=0, seed=args.seed
    )
    engine = Refrag.from_pretrained(args.model)
    rows = evaluation_rows(args.num_questions, seed=args.seed)
    questions, counts = take_questions(((f"almanac, row {number}", row) for number, row in enumerate(rows, 1)), settings)
    named = ("retriever", "weak_depth", "num_questions", "num_passages", "systems", "seed")
    with searched_index(engine.model, questions, settings) as index:
        engine.index = index
        cells = []
        for number in args.num_passages:
            found = run(engine, questions, replace(settings, num_passages=number))
            cells.append({"num_passages": number, "data": found["data"], "systems": found["systems"]})
            for name, row in found["systems"].items():
                print(f"{args.retriever} {number:>3} {name:<12} {row['metrics']['exact_match']} rate {row['compression_rate']:.2f} failed {row['num_failed']} {row['against_plain'].get('exact_match')}", flush=True)
            write_result(args.out, result("passages", settings={name: getattr(args, name) for name in named}, values={"counts": counts, "cells": cells}, seed=args.seed))


if __name__ == "__main__":
    main()
