"""Which chunks to expand: every rule at equal budgets on held-out almanac questions, the learned policies trained here, three seeds each.

    python benchmarks/selection.py --out results/selection.json

Learned policies, over the vectors of one model whose encoder and decoder stay as they are: question-blind (the paper's) and
question-aware, each trained by the paper's grouped objective from nothing (`scratch`), from marked evidence alone
(`supervised`), and by the objective after a supervised start (`both`); all by `refrag train policy`, skipped where done.

`its own policy` is the one that the model came with. Log-perplexity (nats a token) is of the gold answer; `found` is the share of answerable questions for which a chunk that overlaps
the answer's characters is among the expanded; exact match means that greedy decoding gives the gold answer token for token, its
citations and its end included: stricter than the almanac's table, which looks at the words alone.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from refrag.config import BUNDLED_MODEL
from refrag.demo.almanac import Case, Question, cited, evaluation_cases, write_dataset
from refrag.demo.lessons import overlapping
from refrag.evaluation.provenance import result, write_result
from refrag.evaluation.statistics import paired_difference
from refrag.layout import lay_out, mix
from refrag.model import RefragModel, load_model
from refrag.text import PromptBuilder
from refrag.training.rollout import PolicyItem, choices, share_chunk_table

FIXED = ("random", "first", "perplexity", "perplexity-low", "similarity")
OBJECTIVES = {
    "scratch": ["--objective", "grouped"],
    "supervised": ["--objective", "supervised"],
    "both": ["--objective", "grouped", "--supervised-steps"],
}


@dataclass(frozen=True)
class Arguments:
    """All selection rules at equal budgets."""

    model: str = BUNDLED_MODEL
    """Model whose encoder and decoder are used."""
    runs: Path = Path("runs/selection")
    """Folder of the trainings."""
    train_questions: int = 4000
    num_questions: int = 300
    """Held-out questions."""
    fractions: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Budgets p."""
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 300
    """Optimizer steps of each policy."""
    blind_scratch_steps: int | None = None
    """Of the paper's own, question-blind and from nothing, which learns slowest; default: as the others."""
    supervised_steps: int = 150
    """Of these, the supervised start of `both`."""
    batch_size: int = 8
    learning_rate: float = 1e-3
    jobs: int = 1
    """Trainings at a time, one thread each; later measurements at a time."""
    out: Path | None = None
    """JSON file for the result."""


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def untrained(source: RefragModel, folder: Path, *, question_aware: bool) -> Path:
    """The model with a new policy in place of its own."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        model = RefragModel.from_parts(
            source.encoder, source.decoder, encoder_tokenizer=source.encoder_tokenizer, decoder_tokenizer=source.tokenizer,
            chunk_size=source.config.chunk_size, pooling=source.config.pooling, projector_width=source.config.projector_width,
            policy={"kind": "transformer", "hidden_width": 64, "question_aware": question_aware},
        )  # fmt: skip
        model.projector.load_state_dict(source.projector.state_dict())
        model.save_pretrained(folder)
    return folder


def train_all(arguments: Arguments, source: RefragModel) -> list[str]:
    """Train every learned policy that is not there yet; returns their names."""
    data = arguments.runs / "questions.jsonl"
    if not data.exists():
        arguments.runs.mkdir(parents=True, exist_ok=True)
        write_dataset(data, arguments.train_questions, split="train", cite=True)
    commands = {}
    for sight in ("blind", "aware"):
        start = untrained(source, arguments.runs / sight, question_aware=sight == "aware")
        for objective, options in OBJECTIVES.items():
            for seed in arguments.seeds:
                name = f"{sight}-{objective}-{seed}"
                steps = (arguments.blind_scratch_steps if (sight, objective) == ("blind", "scratch") else None) or arguments.steps
                commands[name] = [
                    "--model", str(start), "--data", str(data), "--output-dir", str(arguments.runs / name), "--num-steps", str(steps), "--batch-size", str(arguments.batch_size),
                    "--learning-rate", str(arguments.learning_rate), "--seed", str(seed), "--eval-rows", "40", "--save-every", str(steps), "--device", "cpu", *options,
                ] + ([str(arguments.supervised_steps)] if objective == "both" else [])  # fmt: skip
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda pair: train(arguments.runs, *pair), commands.items()))
    return list(commands)


def train(runs: Path, name: str, command: Sequence[str]) -> None:
    """One training in a process of its own, one thread; done ones return at once."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with (runs / f"{name}.out").open("a") as log:
        subprocess.run([sys.executable, "-m", "refrag.cli", "train", "policy", *command], stdout=log, stderr=log, env=environment, check=True)


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────


def items_of(model: RefragModel, cases: Sequence[tuple[Case, Question]]) -> list[PolicyItem]:
    """Held-out questions as the policy's trainer scores them; gold: the chunks that overlap the answer."""
    builder = PromptBuilder(model.tokenizer, chunk_size=model.config.chunk_size)
    items = []
    for case, question in cases:
        prompt = builder.build(question.text, case.passages)
        completion = [*builder.encode(cited(question)), model.tokenizer.eos_token_id]
        items.append(PolicyItem(prompt, completion, question.text, overlapping(prompt, list(question.hops[-1:])), question.text))
    return items


@torch.no_grad()
def judge(model: RefragModel, item: PolicyItem, chunk_embeds: torch.Tensor, masks: torch.Tensor, found: list[dict[str, float]]) -> torch.Tensor:
    """Negative log-perplexity of the gold answer under each mask; what else is measured is put into `found`, a row a mask."""
    num = len(item.completion)
    layout = lay_out([item.prompt] * len(masks), list(masks), completions=[item.completion] * len(masks))
    mixed = mix(share_chunk_table(layout), model.get_input_embeddings(), model.project(chunk_embeds))
    logits = model.decoder(
        inputs_embeds=mixed.inputs_embeds, attention_mask=mixed.attention_mask, position_ids=mixed.position_ids, use_cache=False, logits_to_keep=num + 1
    ).logits[:, -num - 1 : -1]
    targets = torch.tensor(item.completion).expand(len(logits), -1)
    exact = (logits.argmax(-1) == targets).all(1)
    lengths = torch.tensor([len(chunk.token_ids) for chunk in item.prompt.chunks])
    whole = item.prompt.num_context_tokens
    for mask, right in zip(masks, exact.tolist(), strict=True):
        found.append({"exact_match": float(right), "context_tokens": whole, "context_slots": whole - int((lengths - 1)[~mask].sum())})
    return -torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)


def measure(model: RefragModel, items: Sequence[PolicyItem], rules: Sequence[str], fractions: Sequence[float]) -> dict[str, dict[str, list[float]]]:
    """`RULE@p` -> per item the log-perplexity, the exact match, whether the answer's chunk was expanded, and tokens and slots of the context."""
    values: dict[str, dict[str, list[float]]] = {}
    for number, item in enumerate(items):
        rows: list[dict[str, float]] = []
        made = choices(model, item, fractions=fractions, rules=rules, seed=number, reward=partial(judge, found=rows))
        for choice, row in zip(made, rows, strict=True):
            row |= {"log_perplexity": -choice.reward, "found": float(choice.found > 0) if choice.gold else float("nan")}
            own = values.setdefault(f"{choice.rule}@{choice.expand_fraction:g}", {})
            for name, value in row.items():
                own.setdefault(name, []).append(value)
    return values


def mean_of_seeds(runs: Sequence[dict[str, dict[str, list[float]]]]) -> dict[str, dict[str, list[float]]]:
    """Per item the mean over policies trained with different seeds."""
    return {key: {name: np.mean([run[key][name] for run in runs], axis=0).tolist() for name in runs[0][key]} for key in runs[0]}


def row_of(values: dict[str, list[float]]) -> dict[str, float]:
    """Means, and the measured compression rate."""
    row = {name: round(float(np.nanmean(values[name])), 4) for name in ("log_perplexity", "found", "exact_match") if name in values}
    return row | {"compression_rate": round(sum(values["context_tokens"]) / sum(values["context_slots"]), 3)}


def difference(better: Sequence[float], worse: Sequence[float], *, draws: int = 10_000) -> dict[str, Any]:
    """Mean of the paired differences, with the 95 % interval of a bootstrap over the items."""
    mean, low, high = paired_difference(better, worse, resamples=draws)
    return {"mean": round(mean, 4), "interval": [round(low, 4), round(high, 4)]}


def claims(values: dict[str, dict[str, list[float]]], fractions: Sequence[float]) -> dict[str, Any]:
    """What the paper's order asks for: gains in log-perplexity (above 0: the learned policy is better) and in exact match."""
    made = {}
    for fraction in fractions:
        for objective in OBJECTIVES:
            for sight, rivals in (("blind", FIXED[:-1]), ("aware", FIXED)):
                learned = values[f"{sight}-{objective}@{fraction:g}"]
                for rival in rivals:
                    other = values[f"{rival}@{fraction:g}"]
                    made[f"{sight}-{objective} over {rival} at {fraction:g}"] = {
                        "log_perplexity": difference(other["log_perplexity"], learned["log_perplexity"]),
                        "exact_match": difference(learned["exact_match"], other["exact_match"]),
                    }
    return made


def main() -> None:
    """Train what is not trained yet, measure, write."""
    arguments = tyro.cli(Arguments)
    source = load_model(arguments.model, device="cpu", dtype="float32")
    names = train_all(arguments, source)
    items = items_of(source, list(evaluation_cases(arguments.num_questions)))

    models = {name: load_model(arguments.runs / name / "model", device="cpu", dtype="float32") for name in names}

    def measured(name: str) -> dict[str, dict[str, list[float]]]:
        found = measure(models[name], items, ("learned",), arguments.fractions)
        print(name, {key: row_of(own) for key, own in found.items()}, flush=True)
        return found

    own_threads = partial(torch.set_num_threads, max(1, torch.get_num_threads() // arguments.jobs))
    with ThreadPoolExecutor(arguments.jobs, initializer=own_threads) as pool:  # torch lets other threads run
        trained = pool.map(measured, names)
        fixed = pool.submit(measure, source, items, FIXED, arguments.fractions)
        ends = pool.submit(measure, source, items, ("none", "all"), (0.0,))
        own = pool.submit(measure, source, items, ("learned",), arguments.fractions) if source.has_trained_policy else None
        by_name = dict(zip(names, trained, strict=True))
    values = fixed.result() | ends.result()
    if own is not None:
        values |= {key.replace("learned", "its own policy"): row for key, row in own.result().items()}
    seeds: dict[str, dict[str, Any]] = {}
    for arm in dict.fromkeys(name.rpartition("-")[0] for name in names):
        runs = [by_name[f"{arm}-{seed}"] for seed in arguments.seeds]
        values |= {key.replace("learned", arm): own for key, own in mean_of_seeds(runs).items()}
        seeds[arm] = {str(seed): {key.replace("learned", arm): row_of(own) for key, own in run.items()} for seed, run in zip(arguments.seeds, runs, strict=True)}
    table = {key: row_of(own) for key, own in values.items()}
    for key, row in table.items():
        print(f"{key:<24} {row}", flush=True)
    settings = {name: value for name, value in asdict(arguments).items() if name not in ("out", "runs", "jobs")}
    if arguments.out:
        content = {"table": table, "seeds": seeds, "claims": claims(values, arguments.fractions), "training": curves(arguments.runs, names)}
        write_result(arguments.out, result("selection", settings=settings, values=content, seed=arguments.seeds[0]))


def curves(runs: Path, names: Sequence[str]) -> dict[str, Any]:
    """Of each training: (step, reward, entropy, clip fraction, evidence recall) as logged."""
    found = {}
    for name in names:
        entries = [json.loads(line) for line in (runs / name / "log.jsonl").read_text().splitlines()]
        keys = ("step", "reward", "entropy", "clip_fraction", "evidence_recall")
        found[name] = [[entry.get(key) for key in keys] for entry in entries if "loss" in entry]
    return found


if __name__ == "__main__":
    main()
