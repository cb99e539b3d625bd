"""Makes the bundled model from nothing: tokenizers, decoder pre-training, reconstruction, mixed inputs, policy.

    python -m refrag.demo.train reading --output-dir runs/bundled
    python -m refrag.demo.train reconstruction …   (then: mixed, policy, export)

Every stage resumes where it was stopped. On two CPU cores the whole takes about two hours.
"""

import argparse
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..model import RefragModel
from ..training.policy import PolicyWithGold
from ..training.trainer import RefragTrainer
from .lessons import Lessons, MixedSteps, PolicySteps, ReadingSteps, ReconstructionSteps
from .run import POLICY_FRACTION
from .tokenizer import train_tokenizers

CHUNK_SIZE = 8

logger = logging.getLogger(__name__)


def tokenizers(folder: Path) -> tuple[Any, Any]:
    """The two tokenizers, made once and kept in the run's folder."""
    if not (folder / "tokenizer" / "tokenizer.json").exists():
        decoder_tokenizer, encoder_tokenizer = train_tokenizers()
        encoder_tokenizer.save_pretrained(folder / "encoder_tokenizer")
        decoder_tokenizer.save_pretrained(folder / "tokenizer")
    return AutoTokenizer.from_pretrained(folder / "tokenizer"), AutoTokenizer.from_pretrained(folder / "encoder_tokenizer")


def decoder_config(tokenizer: Any) -> LlamaConfig:
    """A LLaMA of four million parameters."""
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=4096, tie_word_embeddings=True, initializer_range=0.04,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def training_arguments(folder: Path, args: argparse.Namespace) -> TrainingArguments:
    """The settings shared by the stages: a batch is one item of the data set, bf16 autocast, a checkpoint now and then."""
    return TrainingArguments(
        output_dir=str(folder), max_steps=args.num_steps, per_device_train_batch_size=1, learning_rate=args.learning_rate, max_grad_norm=1.0,
        lr_scheduler_type=args.schedule, warmup_steps=args.warmup, bf16=True, use_cpu=args.device == "cpu", logging_steps=args.log_every,
        logging_nan_inf_filter=False, save_steps=args.save_every, save_total_limit=2, report_to=[], remove_unused_columns=False, seed=args.seed,
        dataloader_num_workers=0, disable_tqdm=True,
    )  # fmt: skip


def fit(trainer: RefragTrainer) -> None:
    """Train, or go on from the last checkpoint."""
    checkpoint = get_last_checkpoint(trainer.args.output_dir) if Path(trainer.args.output_dir).exists() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(trainer.args.output_dir)


class InOrder(RefragTrainer):
    """Items are steps: they are taken in order, never shuffled."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return None


def reading(args: argparse.Namespace) -> None:
    """Decoder pre-training on the almanac, full text."""
    tokenizer, _ = tokenizers(args.output_dir)
    data = ReadingSteps(Lessons(tokenizer, CHUNK_SIZE), num_steps=args.num_steps, seed=args.seed, batch_passages=args.batch_passages)
    model = LlamaForCausalLM(decoder_config(tokenizer))
    fit(make_trainer(model, data, args))


def make_trainer(model: Any, data: Any, args: argparse.Namespace) -> RefragTrainer:
    """A trainer that takes the items of `data` in order, one a step."""
    settings = training_arguments(args.output_dir / args.stage, args)
    return InOrder(model=model, args=settings, train_dataset=data, data_collator=lambda items: items[0], optimizer_name="muon")


def reconstruction(args: argparse.Namespace) -> None:
    """Encoder and projector learn to feed the decoder, which is frozen; the encoder starts from the decoder's token embeddings."""
    tokenizer, encoder_tokenizer = tokenizers(args.output_dir)
    decoder = LlamaForCausalLM.from_pretrained(get_last_checkpoint(args.output_dir / "reading"))
    encoder = RobertaModel(encoder_config(encoder_tokenizer), add_pooling_layer=False)
    with torch.no_grad():
        encoder.embeddings.word_embeddings.weight.copy_(decoder.get_input_embeddings().weight)
    model = RefragModel.from_parts(
        encoder, decoder, encoder_tokenizer=encoder_tokenizer, decoder_tokenizer=tokenizer, chunk_size=CHUNK_SIZE, pooling="mean",
        projector_width=256, policy={"kind": "transformer", "hidden_width": 64, "question_aware": True},
    )  # fmt: skip
    for part in (model.decoder, model.policy):
        part.requires_grad_(False)
    fit(make_trainer(model, ReconstructionSteps(model, num_steps=args.num_steps, seed=args.seed), args))


def mixed(args: argparse.Namespace) -> None:
    """Everything but the policy learns to answer from vectors, tokens, and both."""
    model = RefragModel.from_pretrained(args.output_dir / "reconstruction").train()
    model.requires_grad_(True)
    model.policy.requires_grad_(False)
    fit(make_trainer(model, MixedSteps(model, num_steps=args.num_steps, seed=args.seed + 1, batch_passages=args.batch_passages), args))


def policy(args: argparse.Namespace) -> None:
    """The policy learns from marked evidence to rank chunks for a question; encoder and decoder stay as they are."""
    folder = args.output_dir / "policy"
    model = RefragModel.from_pretrained(args.output_dir / "mixed").eval()
    trainer = InOrder(
        model=PolicyWithGold(model.policy), args=training_arguments(folder, args), train_dataset=PolicySteps(model, num_steps=args.num_steps),
        data_collator=lambda items: items[0], optimizer_name="muon",
    )  # fmt: skip
    trainer.compute_loss = partial(Trainer.compute_loss, trainer)  # the module returns its own loss
    trainer.train()
    model.config.policy["trained"] = True
    model.save_pretrained(folder / "model")


def export(args: argparse.Namespace) -> None:
    """The finished model in half precision, as it is bundled."""
    model = RefragModel.from_pretrained(args.output_dir / "policy" / "model").half()
    model.config.expand_fraction = POLICY_FRACTION
    for part in ("encoder", "decoder"):
        setattr(model.config, f"{part}_name", None)
    model.save_pretrained(args.weights)


def encoder_config(tokenizer: Any) -> RobertaConfig:
    """A RoBERTa of a million parameters, as wide as the decoder."""
    return RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, max_position_embeddings=66,
        type_vocab_size=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.04,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("reading", "reconstruction", "mixed", "policy", "export"))
    parser.add_argument("--output-dir", type=Path, default=Path("runs/bundled"))
    parser.add_argument("--weights", type=Path, default=Path(__file__).parent / "weights", help="where export writes")
    parser.add_argument("--num-steps", type=int, default=4000)
    parser.add_argument("--batch-passages", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--schedule", default="warmup_stable_decay")
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    {"reading": reading, "reconstruction": reconstruction, "mixed": mixed, "policy": policy, "export": export}[args.stage](args)


if __name__ == "__main__":
    main()
