"""Two processes over gloo train as one does: data parallel through the Trainer, and with weights sharded by FSDP2.

This file is also the program of the two processes: `torchrun --nproc-per-node 2 test_training_distributed.py FOLDER`.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import build_decoder, build_encoder, mixed_mask, train_encoder_tokenizer, train_tokenizer
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from refrag.encoder import encoder_inputs
from refrag.layout import lay_out
from refrag.model import RefragModel
from refrag.text import Passage, PromptBuilder
from refrag.training.checkpoints import StopOnSignal
from refrag.training.finite import first_non_finite
from refrag.training.sharding import full_state, shard
from refrag.training.trainer import RefragTrainer, next_token_loss

STEPS = 3
TEXT = "The harbour of Velmoor was founded in 1742 by the shipwright Anna Torrel and its lamp burned for ninety years."


def new_model(*, tied=False, **settings) -> RefragModel:
    """A tiny model without dropout, the same in every process."""
    encoder = build_encoder("roberta", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    decoder = build_decoder("llama", tie_word_embeddings=tied)
    torch.manual_seed(3)
    parts = {"encoder_tokenizer": train_encoder_tokenizer(), "decoder_tokenizer": train_tokenizer()}
    return RefragModel.from_parts(encoder, decoder, chunk_size=4, **parts, **settings).train()


class MicroBatches(Dataset):
    """Item i: two rows of other texts, lengths and numbers of labels than the next item's."""

    def __init__(self, model, count=2 * STEPS):
        self.model, self.count = model, count
        self.builder = PromptBuilder(model.tokenizer, chunk_size=4)

    def __len__(self):
        return self.count

    def __getitem__(self, item):
        text = TEXT[4 * item : 4 * item + 50 + 5 * item]
        prompts = [self.builder.build("Who?", [Passage("a", text)]), self.builder.build("What lamp?", [Passage("b", text[10:]), Passage("c", text[5:30])])]
        layout = lay_out(prompts, [mixed_mask(p) for p in prompts], completions=[list(range(5, 9 + item)), [8, 9]])
        ids, mask = encoder_inputs(self.model.encoder, self.model.encoder_tokenizer, [chunk for p in prompts for chunk in p.chunk_texts()])
        return {"layout": layout, "encoder_input_ids": ids, "encoder_attention_mask": mask, "labels": layout.labels, "name": "cpt", "rows": [str(item)] * 2}


def loss_of(model, batch):
    inputs = {key: batch[key] for key in ("layout", "encoder_input_ids", "encoder_attention_mask")} | {"labels": None}
    return next_token_loss(model(**inputs).logits, batch["labels"], None)[0]


# ── what the processes do ────────────────────────────────────────────────────────────────────────────────────────────


def stopped_by_one(folder, rank) -> tuple[int, bool]:
    """Steps until the training ended, and whether it knows that it was told to: the second process gets SIGTERM in its second step."""

    class Told(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if rank == 1 and state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    signals = StopOnSignal()
    trainer = train_with_trainer(folder, accumulate=1, callbacks=[signals, Told()], steps=20)["trainer"]
    return trainer.state.global_step, signals.stopped


def train_with_trainer(folder, *, accumulate, callbacks=(), steps=STEPS) -> dict:
    """Losses in the log, and the weights after training."""
    model = new_model(policy={"kind": "none"})
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=1, gradient_accumulation_steps=accumulate, learning_rate=1e-2, lr_scheduler_type="constant",
        use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, logging_nan_inf_filter=False, remove_unused_columns=False, save_strategy="no",
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    trainer = RefragTrainer(model=model, args=args, train_dataset=MicroBatches(model), data_collator=lambda items: items[0], callbacks=list(callbacks))
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "trainer": trainer,
        "kind": type(trainer.model_wrapped).__name__,
        "losses": [entry["loss"] for entry in entries],
        "norms": [entry["grad_norm"] for entry in entries],
        "named": [entry["cpt/loss"] for entry in entries],
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
    }


def train_plainly(model, batches, *, rank=0, world=1) -> dict:
    """Some steps by hand, each on the mean of two micro-batches: both in one process, or one in each of two."""
    optimizer, losses, norms = torch.optim.AdamW(model.parameters(), lr=1e-2), [], []
    for step in range(STEPS):
        mine = [batches[2 * step + place] for place in range(rank, 2, world)]
        total = torch.zeros(())
        for batch in mine:
            loss = loss_of(model, batch) / len(mine)
            loss.backward()
            total += loss.detach()
        if world > 1:
            dist.all_reduce(total)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item() / world)
        norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
    return {"losses": losses, "norms": norms}


def train_sharded(mesh, *, tied, rank) -> dict:
    """As `train_plainly`, with FSDP2."""
    from torch.distributed.tensor import DTensor

    model = shard(new_model(tied=tied), mesh)
    batches = MicroBatches(model)
    result = train_plainly(model, batches, rank=rank, world=2)
    result["plain"] = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    result["local"] = sum(parameter.to_local().numel() for parameter in model.parameters())
    result["units"] = sorted({type(module).__name__.removeprefix("FSDP") for module in model.modules() if type(module).__name__.startswith("FSDP")})
    result["generated"] = generated(model, batches[0])
    result["weights"] = full_state(model)
    return result


def generated(model, batch):
    """Five tokens after each prompt, and the logits of the last."""
    vectors = torch.randn(batch["layout"].num_chunks, 24, generator=torch.Generator().manual_seed(0))
    out = model.eval().generate(layout=batch["layout"], chunk_embeds=vectors, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return {"tokens": out.sequences, "logits": out.logits[-1]}


def compute_in_bf16(mesh) -> dict:
    """The first loss with bfloat16 weights gathered, and the types that stay."""
    model = shard(new_model(policy={"kind": "none"}), mesh, dtype=torch.bfloat16)
    seen = []
    model.decoder.model.layers[0].mlp.register_forward_hook(lambda mlp, args, output: seen.append((mlp.up_proj.weight.dtype, output.dtype)))
    loss = loss_of(model, MicroBatches(model)[0])
    loss.backward()
    kept = {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters()}
    return {"loss": loss.item(), "computed": seen, "kept": kept}


def find_alone(rank) -> list:
    """What the first process finds while the other one waits."""
    model = new_model(policy={"kind": "none"})
    batch = MicroBatches(model)[0]
    wrapped = nn.parallel.DistributedDataParallel(model)
    loss_of(wrapped, batch)  # a forward pass whose backward pass never comes
    found = []
    if rank == 0:
        found.append(first_non_finite(wrapped, lambda: loss_of(wrapped, batch)))
        model.projector.log_scale.data.fill_(100.0)
        found.append(first_non_finite(wrapped, lambda: loss_of(wrapped, batch)).name)
    dist.barrier()
    return found


def find_sharded(mesh, rank) -> list:
    """What both find in sharded weights: nothing, a gradient; then, broken on one process alone, what it was given, an output, a weight."""
    model = shard(new_model(policy={"kind": "none"}), mesh)
    batch = MicroBatches(model)[0]
    vectors = torch.randn(batch["layout"].num_chunks, 24)

    def run():
        return next_token_loss(model(layout=batch["layout"], chunk_embeds=vectors, labels=None).logits, batch["labels"], None)[0]

    found = [first_non_finite(model, run), first_non_finite(model, run, loss_scale=1e45)]
    if rank == 1:
        vectors.fill_(float("nan"))
    found.append(first_non_finite(model, run))
    vectors.fill_(1.0)
    hook = model.projector.up.register_forward_hook(lambda layer, args, output: output / (1 - rank))
    found.append(first_non_finite(model, run))
    hook.remove()
    run()  # the failed forward pass, whose backward pass never comes
    found.append(first_non_finite(model, run))
    if rank == 1:
        model.decoder.lm_head.weight.to_local().data[0] = float("nan")
    found.append(first_non_finite(model, run))
    return [finding and (finding.what, finding.name) for finding in found]


def main(folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    results = {"trainer": train_with_trainer(folder / "trainer", accumulate=1)}
    del results["trainer"]["trainer"]
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    results |= {"stopped": stopped_by_one(folder / "stopped", rank), "backend": dist.get_backend(), "alone": find_alone(rank)}
    results |= {"sharded": train_sharded(mesh, tied=False, rank=rank), "tied": train_sharded(mesh, tied=True, rank=rank)}
    results |= {"found": find_sharded(mesh, rank), "bf16": compute_in_bf16(mesh)}
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


# ── what they must find ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two processes report."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def assert_weights(some, others, **tolerance) -> None:
    assert some.keys() == others.keys()
    for name, value in some.items():
        torch.testing.assert_close(value, others[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_two_processes_of_the_trainer_equal_one_that_accumulates(ranks, tmp_path):
    one = train_with_trainer(tmp_path, accumulate=2)
    assert ranks[0]["backend"] == "gloo" and one["kind"] == "RefragModel"
    assert len(one["losses"]) == STEPS and one["losses"][-1] < one["losses"][0] - 0.3
    assert ranks[0]["trainer"]["named"] == ranks[1]["trainer"]["named"] == pytest.approx(one["named"], abs=2e-4)
    assert one["named"] == pytest.approx(one["losses"], abs=2e-4)
    for rank in ranks:
        assert rank["trainer"]["kind"] == "DistributedDataParallel"
        assert rank["trainer"]["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert rank["trainer"]["norms"] == pytest.approx(one["norms"], rel=1e-4)
        assert_weights(rank["trainer"]["weights"], one["weights"], atol=1e-5, rtol=1e-4)


def test_one_process_that_is_told_to_stop_stops_both_after_the_same_step(ranks):
    assert [rank["stopped"] for rank in ranks] == [(2, True), (2, True)]


@pytest.mark.parametrize("kind", ["sharded", "tied"])
def test_sharded_weights_train_as_whole_ones(ranks, kind):
    model = new_model(tied=kind == "tied")
    batches = MicroBatches(model)
    one = train_plainly(model, batches)
    assert one["losses"][-1] < one["losses"][0] - 0.3
    for rank in ranks:
        assert rank[kind]["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert rank[kind]["norms"] == pytest.approx(one["norms"], rel=1e-4)
    assert_weights(ranks[0][kind]["weights"], model.state_dict(), atol=1e-5, rtol=1e-4)
    assert ranks[1][kind]["weights"] == {}
    plain = generated(model, batches[0])
    for rank in ranks:
        assert torch.equal(rank[kind]["generated"]["tokens"], plain["tokens"])
        torch.testing.assert_close(rank[kind]["generated"]["logits"], plain["logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["sharded", "tied"])
def test_all_parameters_are_split_between_the_processes(ranks, kind):
    total = sum(parameter.numel() for parameter in new_model(tied=kind == "tied").parameters())
    assert [rank[kind]["plain"] for rank in ranks] == [[], []]
    assert sum(rank[kind]["local"] for rank in ranks) == total
    assert all(rank[kind]["local"] < 0.51 * total for rank in ranks)
    assert ranks[0][kind]["units"] == ["LlamaDecoderLayer", "Projector", "RefragModel", "RobertaEmbeddings", "RobertaLayer", "TransformerPolicy"]


def test_bf16_is_gathered_and_fp32_is_kept(ranks):
    model = new_model(policy={"kind": "none"})
    exact = loss_of(model, MicroBatches(model)[0]).item()
    for rank in ranks:
        assert rank["bf16"]["computed"] == [(torch.bfloat16, torch.bfloat16)] and rank["bf16"]["kept"] == {torch.float32}
        assert rank["bf16"]["loss"] == pytest.approx(exact, rel=0.01) and rank["bf16"]["loss"] != exact


def test_one_process_looks_for_what_is_not_finite_without_the_other(ranks):
    assert [rank["alone"] for rank in ranks] == [[None, "projector"], []]


def test_sharded_processes_look_together_and_agree(ranks):
    assert ranks[0]["found"] == ranks[1]["found"]
    nothing, gradient, *others = ranks[0]["found"]
    assert nothing is None and gradient[0] == "gradient"
    assert others == [("input", ""), ("forward", "projector.up"), None, ("weight", "decoder.lm_head.weight")]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
