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
import sys
from functools import partial
from pathlib import Path
from typing import Any

from prompts import entry, load, measure, read, read_context

from refrag.evaluation.provenance import result, write_result

PRESSES = {"knorm": "KnormPress", "snapkv": "SnapKVPress", "expected-attention": "ExpectedAttentionPress", "streaming-llm": "StreamingLLMPress", "random": "RandomPress"}


def pruned(model: Any, press: Any, row: dict[str, Any]) -> Any:
    """The cache of the row's context, pruned while it is read."""
    with press(model):
        return read_context(model, row)


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
    ask = partial(measure, model, tokenizer, rows, max_new_tokens=args.max_new_tokens, stop=args.stop)
    plain = ask(partial(read_context, model))
    systems = {"plain": entry(plain, plain, rows, args.seed)}
    for name in args.presses:
        for kept in args.kept:
            press = getattr(kvpress, PRESSES[name])(compression_ratio=1 - kept)
            systems[f"kvpress-{name}@{kept:g}"] = entry(ask(partial(pruned, model, press)), plain, rows, args.seed)
            print({key: systems[f"kvpress-{name}@{kept:g}"][key] for key in ("num_questions", "problem")}, name, kept, flush=True)
    settings = {"presses": args.presses, "kept": args.kept, "max_new_tokens": args.max_new_tokens, "decoder": args.decoder.name}
    write_result(args.out, result("qa", settings=settings, values={"complete": True, "data": {"questions": len(rows)}, "systems": systems}, seed=args.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
