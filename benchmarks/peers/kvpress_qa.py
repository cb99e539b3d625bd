"""KV pruning by kvpress on the very prompts and decoder of a `refrag eval qa` run; writes the same kind of result.

kvpress pins an older transformers, so it lives in a virtual environment of its own:

    refrag eval qa --data almanac --prompts-out prompts.jsonl --out results/qa.json
    python -c "from refrag.model import load_model; load_model('bundled').export_decoder('decoder')"
    python3 -m venv .peers && .peers/bin/pip install kvpress
    PYTHONPATH=src .peers/bin/python benchmarks/peers/kvpress_qa.py --prompts prompts.jsonl --decoder decoder --out results/qa-kvpress.json

The context is prefilled and pruned to `--kept` of its key-value pairs, then the question is read and the answer decoded greedily: the
whole prefill is paid for, what is saved is memory and decoding. `plain` is the same decoder without a press. Differences are paired.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from refrag.evaluation.metrics import ANSWER_METRICS, score_answer, scored_text
from refrag.evaluation.provenance import result, write_result
from refrag.evaluation.statistics import mean_interval, median_interval, paired_difference

PRESSES = {"knorm": "KnormPress", "snapkv": "SnapKVPress", "expected-attention": "ExpectedAttentionPress", "streaming-llm": "StreamingLLMPress", "random": "RandomPress"}


def load(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and decoder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()


def answer(model: Any, tokenizer: Any, row: dict[str, Any], press: Any, max_new_tokens: int, stop: str) -> tuple[str, float, int]:
    """(text, seconds to the first token, key-value pairs a head after the prefill)."""
    from contextlib import nullcontext

    import torch
    from transformers import DynamicCache

    start, cache = time.perf_counter(), DynamicCache()
    context = torch.tensor([row["context_ids"]])
    with nullcontext() if press is None else press(model):
        model.model(input_ids=context, past_key_values=cache)
    ids, written, first = torch.tensor([row["question_ids"]]), [], 0.0
    position, kept = context.shape[1], cache.get_seq_length()
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


def measure(model: Any, tokenizer: Any, rows: list[dict[str, Any]], press: Any, args: argparse.Namespace) -> dict[str, list]:
    """Scores, seconds to the first token, slots and, where it went wrong, the problem."""
    import torch

    found: dict[str, list] = {"scores": [], "ttft_s": [], "slots": [], "problem": []}
    with torch.inference_mode():
        for row in rows:
            try:
                text, first, slots = answer(model, tokenizer, row, press, args.max_new_tokens, args.stop)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--decoder", type=Path, required=True)
    parser.add_argument("--presses", nargs="+", choices=PRESSES, default=list(PRESSES))
    parser.add_argument("--kept", nargs="+", type=float, default=[0.25], help="shares of the key-value pairs that stay")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--stop", default="\n")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        import kvpress
    except ImportError as error:
        print(f"kvpress cannot be imported here ({error}): install it into a virtual environment of its own and run this script with that one's python.", file=sys.stderr)
        return 2
    try:
        rows = read(args.prompts, args.limit)
    except (OSError, ValueError) as error:
        print(f"The prompts cannot be read: {error}", file=sys.stderr)
        return 2
    tokenizer, model = load(args.decoder)
    plain = measure(model, tokenizer, rows, None, args)
    systems = {"plain": entry(plain, plain, rows, args.seed)}
    for name in args.presses:
        for kept in args.kept:
            press = getattr(kvpress, PRESSES[name])(compression_ratio=1 - kept)
            systems[f"kvpress-{name}@{kept:g}"] = entry(measure(model, tokenizer, rows, press, args), plain, rows, args.seed)
            print({key: systems[f"kvpress-{name}@{kept:g}"][key] for key in ("num_questions", "problem")}, name, kept, flush=True)
    settings = {"presses": args.presses, "kept": args.kept, "max_new_tokens": args.max_new_tokens, "decoder": args.decoder.name}
    write_result(args.out, result("qa", settings=settings, values={"complete": True, "data": {"questions": len(rows)}, "systems": systems}, seed=args.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
