"""The paper's two training ablations in miniature: what the curriculum and reconstruction are for.

    python benchmarks/ablations.py --out results/ablations.json                                        the almanac, the bundled decoder
    python benchmarks/ablations.py --decoder DIR --data train.txt --eval-data valid.txt --chunk-size 4  any other

Arms, each with every seed, trained by the project's own stages (`refrag train …`) and skipped where they are done:

    reconstruction/paper, reconstruction/none      with and without curriculum, the same number of steps
    cpt/after, cpt/fresh                           continual pre-training from the first of these, and from a new encoder and projector

Log-perplexity (nats a token) is of held-out documents: all tokens of the context from their vectors; and the tokens that
follow the context. Nothing is expanded.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer, RobertaConfig, RobertaModel

from refrag.config import BUNDLED_MODEL
from refrag.demo.almanac import make_case
from refrag.evaluation.provenance import result, write_result
from refrag.model import load_model


@dataclass(frozen=True)
class Arguments:
    """Reconstruction with and without curriculum, CPT with and without reconstruction first."""

    decoder: str = ""
    """Folder of the decoder, a trained one; by default the bundled model's."""
    data: str = ""
    """Texts to train on; by default the almanac's training world, and its held-out world to evaluate on."""
    eval_data: str = ""
    """Texts to evaluate on; none of them may be in the data."""
    num_documents: int = 4000
    """Documents of the almanac, of eight passages each."""
    runs: Path = Path("runs/ablations")
    """Folder of the trainings."""
    chunk_size: int = 8
    """Tokens a chunk, k."""
    max_chunks: int = 8
    """Chunks of the context."""
    output_tokens: int = 64
    """Tokens to predict after the context."""
    reconstruction_steps: int = 400
    cpt_steps: int = 200
    batch_size: int = 16
    """Rows a step."""
    learning_rate: float = 3e-3
    """Peak learning rate of reconstruction; CPT takes a quarter of it."""
    seeds: tuple[int, ...] = (0, 1, 2)
    eval_rows: int = 256
    """Rows evaluated."""
    jobs: int = 2
    """Trainings at a time, one thread each."""
    out: Path | None = None
    """JSON file for the result."""


def make_encoder(decoder: str, folder: Path) -> Path:
    """A RoBERTa of two layers over the decoder's vocabulary, untrained but for the decoder's token embeddings, which it starts with."""
    if not (folder / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(decoder)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
        torch.manual_seed(0)
        known = AutoModelForCausalLM.from_pretrained(decoder).get_input_embeddings().weight.data
        config = RobertaConfig(
            vocab_size=len(tokenizer), hidden_size=max(128, known.shape[1]), num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, max_position_embeddings=130, type_vocab_size=1,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.04, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        encoder = RobertaModel(config, add_pooling_layer=False)
        encoder.embeddings.word_embeddings.weight.data[:, : known.shape[1]] = known * (config.initializer_range / known.std())
        encoder.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def on_the_almanac(arguments: Arguments) -> Arguments:
    """The bundled decoder, and documents of eight passages each of the two worlds."""
    decoder, files = arguments.runs / "decoder", {"data": arguments.runs / "train.jsonl", "eval_data": arguments.runs / "held-out.jsonl"}
    if not decoder.exists():
        load_model(BUNDLED_MODEL, device="cpu", dtype="float32").export_decoder(decoder)
    for (path, count), split in zip(((files["data"], arguments.num_documents), (files["eval_data"], 200)), ("train", "held-out"), strict=True):
        if not path.exists():
            cases = (make_case(f"ablations-{number}", split=split) for number in range(count))
            texts = ("\n\n".join(f"{passage.title}\n{passage.text}" for passage in case.passages) for case in cases)
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return replace(arguments, decoder=str(decoder), **{name: str(path) for name, path in files.items()})


def arms(arguments: Arguments, encoder: Path) -> list[list[tuple[str, list[str]]]]:
    """(folder, command line) of every training; those of a list do not need each other, those of the next list need them."""
    fresh = ["--encoder", str(encoder), "--decoder", arguments.decoder, "--pooling", "mean", "--projector-width", "256", "--chunk-size", str(arguments.chunk_size)]
    common = [
        "--data", arguments.data, "--eval-data", arguments.eval_data, "--max-chunks", str(arguments.max_chunks), "--batch-size", str(arguments.batch_size),
        "--eval-rows", str(arguments.eval_rows), "--optimizer", "muon", "--log-every", "50", "--device", "cpu",
    ]  # fmt: skip
    first, second = [], []
    for seed in arguments.seeds:
        own = [*common, "--seed", str(seed)]
        for curriculum in ("paper", "none"):
            steps = str(arguments.reconstruction_steps)
            first.append((f"reconstruction/{curriculum}/{seed}", ["reconstruction", *fresh, *own, "--curriculum", curriculum, "--num-steps", steps, "--learning-rate", str(arguments.learning_rate), "--save-every", steps]))
        cpt = ["--num-steps", str(arguments.cpt_steps), "--learning-rate", str(arguments.learning_rate / 4), "--output-tokens", str(arguments.output_tokens), "--mixed-share", "0", "--save-every", str(arguments.cpt_steps)]
        first.append((f"cpt/fresh/{seed}", ["cpt", *fresh, *own, *cpt]))
        second.append((f"cpt/after/{seed}", ["cpt", "--model", str(arguments.runs / f"reconstruction/paper/{seed}/model"), *own, *cpt]))
    return [first, second]


def train(arguments: Arguments, name: str, command: Sequence[str]) -> None:
    """One training in a process of its own, one thread; done ones return at once."""
    folder = arguments.runs / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with (folder.parent / f"{folder.name}.out").open("a") as log:
        subprocess.run([sys.executable, "-m", "refrag.cli", "train", *command, "--output-dir", str(folder)], stdout=log, stderr=log, env=environment, check=True)


def outcome(folder: Path) -> dict[str, object]:
    """What a training reached, and its curve: (step, stage, training loss)."""
    done = json.loads((folder / "result.json").read_text())
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    curve = [[entry["step"], round(entry["loss"], 4)] for entry in entries if "loss" in entry]
    return {"log_perplexity": done["eval_loss"], "metrics": {key: value for key, value in done.items() if key.startswith("eval_")}, "seconds": done["seconds"], "curve": curve}


def main() -> None:
    """Train what is not trained yet, and write the table."""
    arguments = tyro.cli(Arguments)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    if not arguments.decoder:
        arguments = on_the_almanac(arguments)
    encoder = make_encoder(arguments.decoder, arguments.runs / "encoder")
    names = []
    for group in arms(arguments, encoder):
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(lambda arm: train(arguments, *arm), group))
        names += [name for name, _ in group]
    runs = {name: outcome(arguments.runs / name) for name in names}
    table = {}
    for arm in dict.fromkeys(name.rpartition("/")[0] for name in names):
        values = [run["log_perplexity"] for name, run in runs.items() if name.rpartition("/")[0] == arm]
        table[arm] = {"log_perplexity": round(fmean(values), 4), "seeds": [round(value, 4) for value in values]}
        print(f"{arm:<24} {table[arm]['log_perplexity']:.4f}  {table[arm]['seeds']}", flush=True)
    settings = {name: value for name, value in asdict(arguments).items() if name not in ("out", "runs", "decoder", "data", "eval_data", "jobs")}
    if arguments.out:
        write_result(arguments.out, result("ablations", settings=settings, values={"table": table, "runs": runs}, seed=arguments.seeds[0]))


if __name__ == "__main__":
    main()
