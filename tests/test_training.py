"""The loss, the optimizer and the trainer: worked by hand, exact on resume, never silent."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from refrag.errors import InputError, MismatchError
from refrag.text import Passage, PromptBuilder
from refrag.training.batches import layout_batch
from refrag.training.fit import build_model
from refrag.training.optimizer import MuonAdamW
from refrag.training.policy import PolicyWithGold, gold_loss, gold_recall
from refrag.training.settings import CptSettings
from refrag.training.trainer import NonFiniteLossError, RefragTrainer, apart, next_token_loss, predicting_slots, token_losses

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")


def test_next_token_loss_by_hand():
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 2] = 100.0  # sure of token 2, which comes next
    labels = torch.tensor([[1, 2, 3]])
    loss, correct = next_token_loss(logits, labels, None)
    assert loss.item() == pytest.approx(math.log(4) / 2) and correct.tolist() == [[True, False]]
    loss, _ = next_token_loss(logits, labels, torch.tensor([[1.0, 1.0, 0.0]]))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    loss, _ = next_token_loss(logits, torch.tensor([[1, 2, -100]]), None)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_logits_of_the_slots_that_a_loss_needs_are_enough():
    labels = torch.full((2, 41), -100)
    labels[0, 20:23], labels[1, 30:32] = torch.tensor([1, 2, 3]), torch.tensor([0, 1])
    slots = predicting_slots(labels)
    assert {19, 20, 21, 29, 30} <= set(slots.tolist()) and len(slots) == 8 and slots.tolist() == sorted(slots.tolist())  # each predicts the label behind it
    logits = torch.randn(2, 41, 4, generator=torch.Generator().manual_seed(0))
    for one, other in zip(token_losses(logits, labels), token_losses(logits[:, slots], labels, slots), strict=True):
        assert torch.equal(one, other)
    assert len(predicting_slots(torch.full((1, 41), -100))) == 7 and predicting_slots(torch.zeros(1, 6, dtype=torch.long)).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "gpt_neox", "mistral"])
def test_a_step_makes_logits_for_the_labels_alone_and_its_loss_is_the_plain_one(tmp_path, make_model, kind):
    model = make_model(kind).eval()
    builder = PromptBuilder(model.tokenizer, chunk_size=model.config.chunk_size)
    prompts = [builder.build("Who?", [Passage("a", "The harbour of Velmoor was founded in 1742. " * count)]) for count in (2, 5)]
    batch = layout_batch(model, prompts, [[index % 3 == 0 for index in range(len(prompt.chunks))] for prompt in prompts], completions=[[5, 6, 2], [7, 2]])
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    seen = []
    handle = model.decoder.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    loss, losses, correct = RefragTrainer(model=model, args=args)._losses(model, batch)
    handle.remove()
    labels = batch["labels"]
    plain, plain_correct = token_losses(model(**{key: value for key, value in batch.items() if key != "labels"}).logits, labels)
    torch.testing.assert_close(losses, plain, atol=1e-5, rtol=1e-5)
    assert loss.item() == pytest.approx(plain.sum().item() / 5, rel=1e-5) and torch.equal(correct, plain_correct)
    assert seen == [8] and labels.shape[1] > 40


def test_questions_stand_behind_the_context_and_do_not_see_each_other():
    out = apart(torch.tensor([[0, 0, 1, 1, 2, 2]]))
    assert out["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3]]
    assert out["attention_mask"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]


def test_many_questions_in_one_row_give_the_logits_of_each_alone(make_decoder):
    decoder = make_decoder("llama")
    context, first, second = [5, 6, 7, 8], [9, 10, 11], [12, 13]
    row = torch.tensor([context + first + second])
    together = decoder(input_ids=row, **apart(torch.tensor([[0] * 4 + [1] * 3 + [2] * 2]))).logits[0]
    alone = decoder(input_ids=torch.tensor([context + second])).logits[0]
    torch.testing.assert_close(together[7:], alone[4:], atol=1e-5, rtol=1e-5)


@needs_muon
def test_muon_takes_the_matrices_and_adamw_the_rest():
    model = nn.ModuleDict({"table": nn.Embedding(7, 4), "linear": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    optimizer = MuonAdamW(model, lr=0.1)
    muon, adamw = optimizer.param_groups
    assert [p.shape for p in muon["params"]] == [(4, 4)] and len(adamw["params"]) == 4


@needs_muon
def test_muon_leaves_an_untied_output_head_to_adamw(make_model):
    model = make_model("llama")
    muon, adamw = (group["params"] for group in MuonAdamW(model, lr=0.1).param_groups)
    head = model.decoder.lm_head.weight
    assert head is not model.get_input_embeddings().weight and any(p is head for p in adamw) and not any(p is head for p in muon)
    assert any(p is model.projector.up.weight for p in muon)


@needs_muon
def test_the_optimizers_state_survives_a_round_trip():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

    def step(net, optimizer, seed):
        torch.manual_seed(seed)
        net(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    first, second = model(), model()
    a, b = MuonAdamW(first, lr=0.1), MuonAdamW(second, lr=0.1)
    for seed in range(3):
        step(first, a, seed)
    for seed in range(2):
        step(second, b, seed)
    third = model()
    third.load_state_dict(second.state_dict())
    c = MuonAdamW(third, lr=0.1)
    c.load_state_dict(b.state_dict())
    step(third, c, 2)
    for left, right in zip(first.parameters(), third.parameters(), strict=True):
        assert torch.equal(left, right)


class Rows(Dataset):
    """Item i is the batch of step i."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, step):
        ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(step))
        answers = torch.zeros_like(ids)
        answers[:, 8:10], answers[:, 10:] = 1, 2
        return {"input_ids": ids, "labels": ids, "answers": answers, "name": "rows"}


def trainer(folder, make_decoder, *, steps, total=None, decoder=None, evaluation=None, **kwargs):
    settings = {"per_device_train_batch_size": 1, "learning_rate": 1e-2, "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "logging_nan_inf_filter": False,
                "remove_unused_columns": False, "save_steps": 2, "lr_scheduler_type": "constant"}  # fmt: skip
    names = {"gradient_accumulation_steps", "save_total_limit", "eval_strategy", "eval_steps", "load_best_model_at_end", "metric_for_best_model"}
    settings |= {name: kwargs.pop(name) for name in names & kwargs.keys()}
    args = TrainingArguments(output_dir=str(folder), max_steps=steps, **settings)
    return RefragTrainer(model=decoder or make_decoder("llama", vocab_size=60), args=args, train_dataset=Rows(total or steps), eval_dataset=evaluation, data_collator=lambda items: items[0], **kwargs)


@needs_muon
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, make_decoder):
    whole = trainer(tmp_path / "whole", make_decoder, steps=4, optimizer_name="muon")
    whole.train()
    trainer(tmp_path / "parts", make_decoder, steps=2, total=4, optimizer_name="muon").train()
    rest = trainer(tmp_path / "parts", make_decoder, steps=4, optimizer_name="muon")
    rest.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    for left, right in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_the_log_holds_the_loss_and_the_share_of_whole_answers(tmp_path, make_decoder):
    run = trainer(tmp_path, make_decoder, steps=3)
    run.train()
    row = next(row for row in run.state.log_history if "rows/loss" in row)
    assert row["rows/loss"] > 0 and 0 <= row["rows/exact_match"] <= 1


def test_whole_answers_are_counted_not_tokens(tmp_path, make_decoder):
    run = trainer(tmp_path, make_decoder, steps=1)
    answers = torch.tensor([[0, 1, 1, 2, 2], [0, 1, 1, 0, 0]])
    correct = torch.tensor([[True, True, True, False], [True, False, True, True]])
    run._tally("x", torch.tensor(0.0), correct, answers)
    assert run._tallies["x"][2:] == [1.0, 3]


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(tmp_path, make_decoder):
    decoder = make_decoder("llama", vocab_size=60)
    with torch.no_grad():
        decoder.get_input_embeddings().weight.fill_(float("nan"))
    run = trainer(tmp_path, make_decoder, steps=2, decoder=decoder)
    with pytest.raises(NonFiniteLossError, match=r"The loss was nan\. .* at step 0 on rows rows in fp32, model.embed_tokens.weight .*--learning-rate"):
        run.train()


def test_an_unknown_optimizer_is_refused(tmp_path, make_decoder):
    with pytest.raises(InputError, match="adamw, adamw_8bit or muon, was 'sgd'"):
        trainer(tmp_path, make_decoder, steps=1, optimizer_name="sgd")


def test_gold_loss_and_recall_by_hand():
    logits = torch.tensor([[2.0, 1.0, 0.0, -50.0]])
    gold = torch.tensor([[False, True, False, False]])
    total = math.log(math.exp(2) + math.exp(1) + 1)
    assert gold_loss(logits, gold).item() == pytest.approx(total - 1)
    assert gold_recall(logits, gold, 1) == 0.0 and gold_recall(logits, gold, 2) == 1.0


def test_the_policy_learns_which_chunk_resembles_the_question():
    from refrag.policy import TransformerPolicy

    torch.manual_seed(0)
    module = PolicyWithGold(TransformerPolicy(16, 32, question_aware=True))
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(250):
        chunks, gold = torch.randn(32, 6, 16), torch.randint(6, (32,))
        question = chunks[torch.arange(32), gold] + 0.1 * torch.randn(32, 16)
        marked = nn.functional.one_hot(gold, 6).bool()
        out = module(chunks, torch.ones(32, 6, dtype=torch.bool), question, torch.zeros(32, 6, dtype=torch.long), marked)
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert gold_recall(out["logits"], marked, 1) > 0.6


class Halves(Dataset):
    """Each item of Rows as two micro-batches of one row."""

    def __len__(self):
        return 8

    def __getitem__(self, item):
        batch = Rows(4)[item // 2]
        return {key: value if key == "name" else value[item % 2 : item % 2 + 1] for key, value in batch.items()}


def test_accumulated_passes_are_averaged(tmp_path, make_decoder):
    whole = trainer(tmp_path / "whole", make_decoder, steps=4)
    whole.train()
    halves = trainer(tmp_path / "halves", make_decoder, steps=4, gradient_accumulation_steps=2)
    halves.train_dataset = Halves()
    halves.train()
    losses = [[row["loss"] for row in run.state.log_history if "loss" in row] for run in (whole, halves)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 4


def test_evaluation_by_hand(tmp_path, make_decoder):
    run = trainer(tmp_path, make_decoder, steps=1, evaluation=Rows(3))
    metrics = run.evaluate()
    losses, correct = [], []
    for item in range(3):
        ids = Rows(3)[item]["input_ids"]
        with torch.no_grad():
            log_probs = run.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        losses.append(-log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1))
        correct.append(log_probs.argmax(-1) == ids[:, 1:])
    assert metrics["eval_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    assert metrics["eval_token_accuracy"] == pytest.approx(torch.cat(correct).float().mean().item(), abs=1e-5)
    assert metrics["eval_exact_match"] == 0.0 and metrics["eval_tokens"] == 3 * 2 * 11
    assert [bool(run.evaluate()) and run.model.train(mode).training == mode for mode in (True, False)] == [True, True]


def test_the_log_holds_speed_and_memory(tmp_path, make_decoder):
    run = trainer(tmp_path, make_decoder, steps=2)
    run.train()
    row = next(row for row in run.state.log_history if "loss" in row)
    assert row["tokens_per_s"] > 0 and row["peak_memory_bytes"] > 1e6


def test_the_latest_checkpoints_and_the_best_one_are_kept(tmp_path, make_decoder):
    more = {"save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    run = trainer(tmp_path, make_decoder, steps=8, evaluation=Rows(1), **more)
    run.train()
    best = run.state.best_global_step
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-8", f"checkpoint-{best}"}
    assert (tmp_path / "best").resolve().name == f"checkpoint-{best}" and not (tmp_path / ".saving").exists()
    losses = {row["step"]: row["eval_loss"] for row in run.state.log_history if "eval_loss" in row}
    assert losses[best] == min(losses.values()) and run.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-5)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, make_decoder, monkeypatch):
    run = trainer(tmp_path, make_decoder, steps=6)
    save = torch.save

    def full(content, path, *args, **kwargs):
        if run.state.global_step >= 4:
            raise OSError(28, "No space left on device")
        save(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"The checkpoint of step 4 could not be written .* the disk is full \(the last good checkpoint is checkpoint-2\): free some space"):
        run.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    rest = trainer(tmp_path, make_decoder, steps=6)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    whole = trainer(tmp_path / "whole", make_decoder, steps=6)
    whole.train()
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path, make_decoder):
    run = trainer(tmp_path, make_decoder, steps=2)
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    last = run.model.model.layers[0].mlp.down_proj
    last.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteLossError, match=r"The gradient norm was (inf|nan)\. .*layers.0.mlp.down_proj"):
        run.train()
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def test_of_accumulated_micro_batches_the_one_that_did_it_is_named(tmp_path, make_decoder):
    run = trainer(tmp_path, make_decoder, steps=1, total=3, gradient_accumulation_steps=3)
    run.train_dataset = [{**run.train_dataset[place], "rows": [f"row-{place}"]} for place in range(3)]
    bad = run.train_dataset[1]["input_ids"]
    head = run.model.lm_head
    run.model.register_forward_pre_hook(lambda module, args, kwargs: setattr(module, "is_bad", torch.equal(kwargs["input_ids"], bad)), with_kwargs=True)
    head.weight.register_hook(lambda grad: grad * float("inf") if run.model.is_bad else grad)
    with pytest.raises(NonFiniteLossError, match=r"The gradient norm was (inf|nan)\. The loss was finite at step 0 on rows row-1 in fp32, .*lm_head"):
        run.train()


def test_a_model_of_several_chunk_sizes_is_trained_further_with_one(tmp_path):
    model = build_model(CptSettings(model="bundled", data=("d",), output_dir=tmp_path / "out", chunk_size=16))
    assert (model.config.chunk_size, model.config.chunk_sizes) == (16, None)
    with pytest.raises(MismatchError, match="made with chunk_size 8 or 16, 32 was asked for"):
        build_model(CptSettings(model="bundled", data=("d",), output_dir=tmp_path / "out", chunk_size=32))
