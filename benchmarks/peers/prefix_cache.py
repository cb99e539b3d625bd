"""Prefix caching on the very prompts and decoder of a `refrag eval qa` run; writes the same kind of result.

    refrag eval qa --data almanac --prompts-out prompts.jsonl --out results/qa.json
    python -c "from refrag.model import load_model; load_model('bundled').export_decoder('decoder')"
    python benchmarks/peers/prefix_cache.py --prompts prompts.jsonl --decoder decoder --out results/qa-prefix-cache.json

The best case of it: every question finds the key-value pairs of exactly its passages, in exactly this order, made before. Time to the first token counts the copy of
the pairs (`memory`) or their reading from a file (`disk`), and the question's prefill; `plain` reads everything. The order of the three is drawn anew for every question.
The answers are plain RAG's by construction (the run shows it), and no slot is saved: what it costs is `stored_bytes` a question, counted beside what chunk vectors take.
"""

import argparse
import random
import sys
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from prompts import entry, load, measure, read, read_context

from refrag.evaluation.provenance import result, write_result

SYSTEMS = ("plain", "prefix-cache-memory", "prefix-cache-disk")


def restored(tensors: dict[str, Any], *, copy: bool) -> Any:
    """A cache with these keys and values, which the answer then extends."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(len(tensors) // 2):
        keys, values = tensors[f"{layer}.keys"], tensors[f"{layer}.values"]
        cache.update(keys.clone() if copy else keys, values.clone() if copy else values, layer)
    return cache


def prefills(model: Any, row: dict[str, Any], file: Path) -> tuple[dict[str, Any], int]:
    """How each system gets the cache of this row's context, and the bytes that are stored for it."""
    import torch
    from safetensors.torch import load_file, save_file

    with torch.inference_mode():
        cache = read_context(model, row)
    tensors = {f"{number}.{kind}": getattr(layer, kind).contiguous() for number, layer in enumerate(cache.layers) for kind in ("keys", "values")}
    save_file(tensors, file)
    ways = (partial(read_context, model), lambda row: restored(tensors, copy=True), lambda row: restored(load_file(file), copy=False))
    return dict(zip(SYSTEMS, ways, strict=True)), sum(tensor.nbytes for tensor in tensors.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--decoder", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--stop", default="\n")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        rows = read(args.prompts, args.limit)
    except (OSError, ValueError) as error:
        print(f"The prompts cannot be read: {error}", file=sys.stderr)
        return 2
    tokenizer, model = load(args.decoder)
    found: dict[str, dict[str, list]] = {name: defaultdict(list) for name in SYSTEMS}
    stored, rng = [], random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            ways, size = prefills(model, row, Path(folder) / "cache.safetensors")
            stored.append(size)
            for name in rng.sample(SYSTEMS, len(SYSTEMS)):
                for key, values in measure(model, tokenizer, [row], ways[name], args.max_new_tokens, args.stop).items():
                    found[name][key] += values
    systems = {name: entry(own, found["plain"], rows, args.seed) for name, own in found.items()}
    for name in SYSTEMS[1:]:
        systems[name]["stored_bytes"] = sum(stored) / len(stored)
        print(name, systems[name]["metrics"]["exact_match"], systems[name]["ttft_s"], flush=True)
    settings = {"max_new_tokens": args.max_new_tokens, "decoder": args.decoder.name, "limit": args.limit}
    write_result(args.out, result("qa", settings=settings, values={"complete": True, "data": {"questions": len(rows)}, "systems": systems}, seed=args.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
