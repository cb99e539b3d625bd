"""Exact match of the bundled model on 1,000 held-out almanac questions over eight competing passages each.

    python benchmarks/almanac.py --out results/almanac.json

Each system answers the same questions over the same passages with the same decoder; 95 % bootstrap intervals.
"""

import argparse
from pathlib import Path

from refrag.config import BUNDLED_MODEL
from refrag.demo.almanac import evaluation_cases
from refrag.demo.run import POLICY_FRACTION, compare, summarise
from refrag.engine import Refrag
from refrag.evaluation.provenance import result, write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=BUNDLED_MODEL)
    parser.add_argument("--num-questions", type=int, default=1000)
    parser.add_argument("--num-passages", type=int, default=8)
    parser.add_argument("--splits", nargs="+", default=["held-out", "held-out-forms"])
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/almanac.json"))
    args = parser.parse_args()
    engine = Refrag.from_pretrained(args.model)
    values: dict[str, dict] = {}
    for split in args.splits:
        cases = list(evaluation_cases(args.num_questions, split=split, num_passages=args.num_passages, seed=args.seed))
        asked = compare(engine, cases, batch_size=args.batch_size)
        values[split] = {name: summarise(rows) for name, rows in asked.items()}
        for row in values[split].values():
            del row["ttft_ms"]  # that of a batch says nothing about a request
        for name, row in values[split].items():
            print(f"{split:<15} {name:<26} {row['exact_match']:.3f} {row['interval']} rate {row['compression_rate']} {row['by_kind']}", flush=True)
    settings = {"num_questions": args.num_questions, "num_passages": args.num_passages, "expand_fraction": POLICY_FRACTION, "seed": args.seed}
    write_result(args.out, result("almanac", settings=settings, values={"splits": values}, seed=args.seed))


if __name__ == "__main__":
    main()
