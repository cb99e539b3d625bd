"""Trained at L, evaluated at L/2 … 16L: does a model read contexts longer than any it was trained on? The bundled model, in three tasks.

    python benchmarks/lengths.py --out results/lengths.json

needle           held-out almanac questions over N passages, all compressed (trained with 8): exact match, and with the policy's
                 chunks expanded, its budget a number of chunks
log-perplexity   nats a token of the gold answer in the same contexts
copy             N chunks of one passage stream as vectors, all their tokens out, teacher-forced (trained with up to 8): share of
                 tokens right, and of contexts copied without a mistake

Only slots count against the decoder's positions, so 128 passages, 16 times what was trained, still fit.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import tyro

from refrag.config import BUNDLED_MODEL, Budget
from refrag.demo.almanac import cited, evaluation_cases, make_case
from refrag.demo.run import ask_all
from refrag.engine import Refrag
from refrag.errors import InputError
from refrag.evaluation.provenance import result, write_result
from refrag.evaluation.statistics import mean_interval
from refrag.model import RefragModel, load_model
from refrag.text import PromptBuilder
from refrag.training.batches import ChunkedDocuments, layout_batch
from refrag.training.data import Document
from refrag.training.rollout import PolicyItem, choices

TRAINED_PASSAGES, TRAINED_CHUNKS = 8, 8


@dataclass(frozen=True)
class Arguments:
    """Contexts of half to sixteen times the length of training."""

    model: str = BUNDLED_MODEL
    factors: tuple[float, ...] = (0.5, 1, 2, 4, 16)
    """Lengths, as multiples of the longest that training showed."""
    num_questions: int = 200
    """Questions a length."""
    num_copies: int = 64
    """Contexts to copy a length."""
    expand_chunks: int = 8
    """Budget of the policy."""
    seed: int = 0
    out: Path | None = None
    """JSON file for the result."""


def needle(engine: Refrag, num_passages: int, arguments: Arguments) -> dict[str, Any]:
    """Exact match with nothing expanded and with the policy, and the log-perplexity of the gold answer for both."""
    cases = list(evaluation_cases(arguments.num_questions, num_passages=num_passages, seed=arguments.seed))
    budget = Budget(expand_chunks=arguments.expand_chunks)
    found: dict[str, Any] = {"num_passages": num_passages}
    for name, options in {"none": {"policy": "none"}, "learned": {"policy": "learned", "budget": budget}, "all": {"policy": "all"}}.items():
        try:
            asked = ask_all(engine, cases, options, batch_size=max(1, 64 // num_passages))
        except InputError as error:  # full text has a slot a token
            found[name] = {"refused": str(error)}
            continue
        score, low, high = mean_interval([one.exact_match for one in asked])
        slots = fmean(one.answer.usage["prompt_slots"] for one in asked)
        found[name] = {"exact_match": round(score, 4), "interval": [round(low, 4), round(high, 4)], "prompt_slots": round(slots)}
    rewards: dict[str, list[float]] = {"none": [], "learned": []}
    builder = PromptBuilder(engine.model.tokenizer, chunk_size=engine.model.config.chunk_size)
    for number, (case, question) in enumerate(cases):
        prompt = builder.build(question.text, case.passages)
        item = PolicyItem(prompt, [*builder.encode(cited(question)), engine.model.tokenizer.eos_token_id], question.text)
        share = arguments.expand_chunks / len(prompt.chunks)
        for choice in choices(engine.model, item, fractions=(share,), rules=("none", "learned"), seed=number):
            rewards[choice.rule].append(-choice.reward)
    for name, values in rewards.items():
        found[name]["log_perplexity"] = round(fmean(values), 4)
    return found


@torch.no_grad()
def copy(model: RefragModel, num_chunks: int, arguments: Arguments) -> dict[str, Any]:
    """Share of tokens right, and of contexts without a mistake."""
    builder, right, whole = PromptBuilder(model.tokenizer, chunk_size=model.config.chunk_size), [], []
    for number in range(arguments.num_copies):
        rng = random.Random(f"copy-{arguments.seed}-{number}")
        passages = chain.from_iterable(make_case(f"copy-{arguments.seed}-{number}-{part}", split="held-out").passages for part in range(100))
        documents: list[Document] = []
        while sum(len(builder.chunk(document.text).spans) for document in documents) < num_chunks + 8:
            passage = next(passages)
            documents.append(Document(passage.id, passage.text))
        chunked = ChunkedDocuments(documents, builder)
        prompt = chunked.prompt(chunked.refs(rng.randrange(8), num_chunks))
        completion = [token for chunk in prompt.chunks for token in chunk.token_ids]
        batch = layout_batch(model, [prompt], [[False] * num_chunks], completions=[completion])
        labels = batch.pop("labels")
        predicted = model(**batch).logits[:, :-1].argmax(-1)
        hits = (predicted == labels[:, 1:])[labels[:, 1:] >= 0]
        right.append(hits.float().mean().item())
        whole.append(float(hits.all()))
    return {"num_chunks": num_chunks, "token_accuracy": round(fmean(right), 4), "exact": round(fmean(whole), 4)}


def lengths(trained: int, factors: Sequence[float]) -> list[int]:
    """Whole numbers."""
    return [max(1, round(trained * factor)) for factor in factors]


def main() -> None:
    """All lengths of all tasks."""
    arguments = tyro.cli(Arguments)
    engine = Refrag(load_model(arguments.model, device="cpu", dtype="float32"))
    values: dict[str, Any] = {"trained": {"passages": TRAINED_PASSAGES, "chunks": TRAINED_CHUNKS}, "needle": [], "copy": []}
    for num_chunks in lengths(TRAINED_CHUNKS, arguments.factors):
        values["copy"].append(copy(engine.model, num_chunks, arguments))
        print(values["copy"][-1], flush=True)
    for num_passages in lengths(TRAINED_PASSAGES, arguments.factors):
        values["needle"].append(needle(engine, num_passages, arguments))
        print(values["needle"][-1], flush=True)
    settings = {name: value for name, value in asdict(arguments).items() if name != "out"}
    if arguments.out:
        write_result(arguments.out, result("lengths", settings=settings, values=values, seed=arguments.seed))


if __name__ == "__main__":
    main()
