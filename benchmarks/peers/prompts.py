"""What the peers share: the prompts of a `refrag eval qa` run, greedy answers of the decoder over a cache, rows of a `qa` result."""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from refrag.evaluation.metrics import ANSWER_METRICS, score_answer, scored_text
from refrag.evaluation.statistics import mean_interval, median_interval, paired_difference

Prefill = Callable[[dict[str, Any]], Any]
"""From a row of the prompts to the cache of its context; what it takes counts into the time to the first token."""


def load(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and decoder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()


def read_context(model: Any, row: dict[str, Any]) -> Any:
    """A new cache with the row's context in it."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    model.model(input_ids=torch.tensor([row["context_ids"]]), past_key_values=cache)
    return cache


def answer(model: Any, tokenizer: Any, row: dict[str, Any], prefill: Prefill, max_new_tokens: int, stop: str) -> tuple[str, float, int]:
    """(text, seconds to the first token, key-value pairs a head after the prefill)."""
    import torch

    start = time.perf_counter()
    cache = prefill(row)
    ids, written, first = torch.tensor([row["question_ids"]]), [], 0.0
    position, kept = len(row["context_ids"]), cache.get_seq_length()
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    for _ in range(max_new_tokens):
        places = torch.arange(position, position + ids.shape[1])[None]
        token = int(model(input_ids=ids, past_key_values=cache, position_ids=places).logits[0, -1].argmax())
        first = first or time.perf_counter() - start
        if token in ends:
            break
        written.append(token)
        if stop and stop in tokenizer.decode(written):
            break
        position, ids = position + ids.shape[1], torch.tensor([[token]])
    text = tokenizer.decode(written, skip_special_tokens=True).split(stop)[0] if stop else tokenizer.decode(written, skip_special_tokens=True)
    return text.strip(), first, kept + len(row["question_ids"])


def measure(model: Any, tokenizer: Any, rows: Iterable[dict[str, Any]], prefill: Prefill, max_new_tokens: int, stop: str) -> dict[str, list]:
    """Scores, seconds to the first token, slots and, where it went wrong, the problem."""
    import torch

    found: dict[str, list] = {"scores": [], "ttft_s": [], "slots": [], "problem": []}
    with torch.inference_mode():
        for row in rows:
            try:
                text, first, slots = answer(model, tokenizer, row, prefill, max_new_tokens, stop)
            except (RuntimeError, MemoryError) as error:  # out of memory: what was measured is kept
                found["problem"].append((str(error).splitlines() or [type(error).__name__])[0])
                break
            found["scores"].append(score_answer(scored_text(text), row["answers"], answerable=row["answerable"]))
            found["ttft_s"].append(first)
            found["slots"].append(slots)
    return found


def entry(found: dict[str, list], plain: dict[str, list], rows: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The row of a `qa` result that `refrag eval qa` has for its systems."""

    def interval(values: list[float]) -> dict[str, Any]:
        return dict(zip(("mean", "low", "high"), mean_interval(values, seed=seed), strict=True)) | {"n": len(values)}

    def gap(name: str) -> dict[str, Any]:
        pairs = list(zip(found["scores"], plain["scores"], strict=False))
        mean, low, high = paired_difference([own[name] for own, _ in pairs], [other[name] for _, other in pairs], seed=seed)
        return {"mean": mean, "low": low, "high": high, "n": len(pairs)}

    done = len(found["scores"])
    if not done:
        return {"kind": "peer", "num_questions": 0, "num_failed": len(rows), "problem": found["problem"][0], "metrics": dict.fromkeys(ANSWER_METRICS), "ttft_s": None}
    middle = median_interval(found["ttft_s"])
    context = sum(len(row["context_ids"]) for row in rows[:done])
    kept = sum(found["slots"]) - sum(len(row["question_ids"]) for row in rows[:done])
    return {
        "kind": "plain" if found is plain else "peer",
        "num_questions": done,
        "num_failed": len(rows) - done,
        "problem": found["problem"][0] if found["problem"] else None,
        "metrics": {name: interval([own[name] for own in found["scores"]]) for name in ANSWER_METRICS},
        "prompt_slots": sum(found["slots"]) / done,
        "compression_rate": context / kept,
        "ttft_s": {"median": middle.median, "low": middle.low, "high": middle.high, "n": done},
        "against_plain": {} if found is plain else {name: gap(name) for name in ANSWER_METRICS},
    }


def read(path: Path, limit: int | None) -> list[dict[str, Any]]:
    """The prompts that `refrag eval qa --prompts-out` wrote."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:limit]
    if not rows or not all({"context_ids", "question_ids", "answers", "answerable"} <= row.keys() for row in rows):
        raise ValueError(f"{path} must hold prompts of  refrag eval qa --prompts-out")
    return rows
