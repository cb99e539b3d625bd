"""Answers in conversations: every turn brings passages of its own, and all of them stay in the prompt (compress anywhere, paper section 5.2).

    python benchmarks/conversations.py --out results/conversations.json

Held-out almanac cases whose passages are dealt out over the turns. Each earlier turn asked about one of its own passages and was answered rightly; the last
question may be about any passage of the conversation, so that what it needs mostly stands in an earlier turn. The table is written after every cell.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from refrag.config import BUNDLED_MODEL
from refrag.demo.almanac import Case, cited, evaluation_cases
from refrag.engine import Refrag
from refrag.evaluation.provenance import result, write_result
from refrag.evaluation.qa import run
from refrag.evaluation.questions import take_questions
from refrag.evaluation.tasks import QaSettings


def conversations(num_questions: int, *, turns: int, per_turn: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of questions with their history: the last turn's passages are the row's, the others' stand in their turns."""
    for number, (case, question) in enumerate(evaluation_cases(num_questions, num_passages=turns * per_turn, seed=seed)):
        passages = [{"id": p.id, "title": p.title, "text": p.text, "is_gold": at in question.gold} for at, p in enumerate(case.passages)]
        history = []
        for first in range(0, (turns - 1) * per_turn, per_turn):
            own = range(first, first + per_turn)
            asked = asked_about(case, own, besides=question.text)
            history += [{"role": "user", "text": asked[0], "passages": [passages[at] for at in own]}, {"role": "assistant", "text": asked[1]}]
        yield {"id": str(number), "question": question.text, "answers": [question.answer], "kind": question.kind, "passages": passages[-per_turn:], "history": history}


def asked_about(case: Case, passages: range, *, besides: str) -> tuple[str, str]:
    """A question that one of these passages answers, and its answer."""
    found = (own for own in case.questions if own.kind == "one-hop" and own.gold[0] in passages and own.text != besides)
    question = next(found)
    return question.text, cited(question).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=BUNDLED_MODEL)
    parser.add_argument("--turns", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--per-turn", type=int, nargs="+", default=[2, 4], help="passages a turn")
    parser.add_argument("--num-questions", type=int, default=1000)
    parser.add_argument("--systems", nargs="+", default=["none", "learned@0.1"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/conversations.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    engine = Refrag.from_pretrained(args.model)
    named = ("turns", "per_turn", "num_questions", "systems", "seed")
    cells = []
    for turns in args.turns:
        for per_turn in args.per_turn:
            settings = QaSettings(data=("almanac",), num_passages=per_turn, systems=tuple(args.systems), timed_requests=0, num_examples=0, seed=args.seed)
            rows = conversations(args.num_questions, turns=turns, per_turn=per_turn, seed=args.seed)
            questions, _ = take_questions(((f"conversation {number}", row) for number, row in enumerate(rows, 1)), settings)
            found = run(engine, questions, settings)
            cells.append({"turns": turns, "per_turn": per_turn, "data": found["data"], "systems": found["systems"]})
            for name, row in found["systems"].items():
                print(f"{turns} turns of {per_turn}: {name:<12} {row['metrics']['exact_match']} rate {row['compression_rate']:.2f} {row['against_plain'].get('exact_match')}", flush=True)
            write_result(args.out, result("conversations", settings={name: getattr(args, name) for name in named}, values={"cells": cells}, seed=args.seed))


if __name__ == "__main__":
    main()
