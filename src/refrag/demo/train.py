"""Makes the bundled model from nothing, stage by stage; every stage goes on where it was stopped.

    python -m refrag.demo.train reading --output-dir runs/bundled        decoder: full text
    python -m refrag.demo.train reconstruction --output-dir runs/bundled encoder and projector, decoder frozen
    python -m refrag.demo.train mixed --output-dir runs/bundled          everything: vectors, tokens, and both
    python -m refrag.demo.train polish --output-dir runs/bundled         the same, with chains of facts and what is not there
    python -m refrag.demo.train stretch --output-dir runs/bundled        the same, with long passages and chunks of two sizes
    python -m refrag.demo.train policy --output-dir runs/bundled         which chunks to expand
    python -m refrag.demo.train export --output-dir runs/bundled         half precision, into the package

`runs/bundled_model.sh` holds the settings of the weights that are bundled.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..config import resolve_model
from ..errors import NotFoundError
from ..model import RefragModel
from ..training.policy import PolicyWithGold
from ..training.trainer import RefragTrainer
from .guidance import CITE_LAYER, Guide
from .lessons import POLISH, STRETCH, Lessons, MixedSteps, Phase, PolicySteps, ReadingSteps, ReconstructionSteps
from .run import POLICY_FRACTION
from .tokenizer import train_tokenizers

CHUNK_SIZE = 8
CHUNK_SIZES = [8, 16]
GUIDANCE = 0.3
"""Weight of the attention's loss beside the answers'."""


class AlmanacTrainer(RefragTrainer):
    """Items are the batches of the steps, taken in order; a guide's loss is added where there is one."""

    def __init__(self, *args: Any, guide: Guide | None = None, **kwargs: Any) -> None:
        super().__init__(*args, optimizer_name="muon", **kwargs)
        self.guide = guide

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> None:
        return None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The answers' loss, and a share of the attention's."""
        inputs = dict(inputs)
        guided = [inputs.pop(name, None) for name in ("pointers", "titles")]
        if self.guide is None or "segments" not in inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)
        self.guide.set(slot_ids(inputs), inputs["labels"], inputs["segments"], *guided)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        for layer, guidance in self.guide.losses.items():
            self._tally("guide-cite" if layer == CITE_LAYER else "guide-read", guidance, torch.zeros(0), None)
            loss = loss + GUIDANCE * guidance
        return loss


def slot_ids(batch: dict[str, Any]) -> torch.Tensor:
    """The token of every slot, -1 where a slot holds a vector or nothing; int64 [batch slot]."""
    if "input_ids" in batch:
        return batch["input_ids"]
    layout = batch["layout"]
    is_token = (layout.source >= 0) & (layout.source < len(layout.token_ids))
    return torch.where(is_token, layout.token_ids[layout.source.clamp(0, len(layout.token_ids) - 1)], -1)


def reading(args: argparse.Namespace) -> None:
    """Decoder pre-training on the almanac, full text."""
    tokenizer, _ = tokenizers(args.output_dir)
    data = ReadingSteps(Lessons(tokenizer, CHUNK_SIZE), num_steps=args.num_steps, seed=args.seed, batch_passages=args.batch_passages)
    decoder = LlamaForCausalLM(decoder_config(tokenizer))
    fit(decoder, data, args, guide=Guide(tokenizer, decoder))


def reconstruction(args: argparse.Namespace) -> None:
    """Encoder and projector learn to feed the decoder, which is frozen; the encoder starts from the decoder's token embeddings."""
    tokenizer, encoder_tokenizer = tokenizers(args.output_dir)
    checkpoint = get_last_checkpoint(args.output_dir / "reading") if (args.output_dir / "reading").exists() else None
    if checkpoint is None:
        raise NotFoundError(f"Reconstruction needs a trained decoder, {args.output_dir} holds none: run the stage reading first.")
    decoder = LlamaForCausalLM.from_pretrained(checkpoint)
    encoder = RobertaModel(encoder_config(encoder_tokenizer), add_pooling_layer=False)
    encoder.embeddings.word_embeddings.weight.data.copy_(decoder.model.embed_tokens.weight.data)
    model = RefragModel.from_parts(
        encoder, decoder, encoder_tokenizer=encoder_tokenizer, decoder_tokenizer=tokenizer, chunk_size=CHUNK_SIZE, pooling="mean",
        projector_width=256, policy={"kind": "transformer", "hidden_width": 64, "question_aware": True},
    )  # fmt: skip
    model.decoder.requires_grad_(False)
    policy_of(model).requires_grad_(False)
    fit(model, ReconstructionSteps(model, num_steps=args.num_steps, seed=args.seed), args)


def mixed(args: argparse.Namespace) -> None:
    """Everything but the policy learns to answer from vectors, tokens, and both."""
    model = RefragModel.from_pretrained(args.output_dir / "reconstruction").train()
    model.requires_grad_(True)
    policy_of(model).requires_grad_(False)
    data = MixedSteps(model, num_steps=args.num_steps, seed=args.seed + 1, batch_passages=args.batch_passages)
    fit(model, data, args, guide=Guide(model.tokenizer, model.decoder))


def polish(args: argparse.Namespace) -> None:
    """As mixed, from its model or the one given by `--start`: chains of two facts, absent facts, and more of full text."""
    go_on(args, "mixed", seed=5, phases=POLISH, full=0.45)


def stretch(args: argparse.Namespace) -> None:
    """As polish, from its model: half of the passages are long, some contexts have sixteen, and chunks have 8 or 16 tokens."""
    go_on(args, "polish", seed=7, phases=STRETCH, full=0.4, sizes=CHUNK_SIZES)


def go_on(args: argparse.Namespace, before: str, *, seed: int, phases: Sequence[Phase], full: float, sizes: list[int] | None = None) -> None:
    """Mixed training from the model of the stage before, or the one given by `--start`."""
    model = RefragModel.from_pretrained(resolve_model(args.start or args.output_dir / before), dtype=torch.float32).train()
    model.config.chunk_sizes = sizes
    model.requires_grad_(True)
    policy_of(model).requires_grad_(False)
    data = MixedSteps(model, num_steps=args.num_steps, seed=args.seed + seed, batch_passages=args.batch_passages, phases=phases, full=full)
    fit(model, data, args, guide=Guide(model.tokenizer, model.decoder))


def policy(args: argparse.Namespace) -> None:
    """The policy learns from marked evidence to rank chunks for a question; encoder and decoder stay as they are."""
    model = RefragModel.from_pretrained(resolve_model(args.start or args.output_dir / "stretch"), dtype=torch.float32).eval()
    data, folder = PolicySteps(model, num_steps=args.num_steps, seed=args.seed + 3), args.output_dir / "policy"
    trainer = Trainer(model=PolicyWithGold(policy_of(model)), args=training_arguments(folder, args), train_dataset=data, data_collator=first)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)
    model.config.policy["trained"] = True
    model.save_pretrained(args.output_dir / "policy" / "model")


def export(args: argparse.Namespace) -> None:
    """The finished model in half precision, as it is bundled."""
    model = RefragModel.from_pretrained(args.output_dir / "policy" / "model").half()
    model.config.expand_fraction = POLICY_FRACTION
    model.config.encoder_name = model.config.decoder_name = None
    for part in (model.encoder, model.decoder):
        part.config._name_or_path = ""  # else the folder of the run
    model.save_pretrained(args.weights)


def fit(model: nn.Module, data: Dataset, args: argparse.Namespace, *, guide: Guide | None = None) -> None:
    """Train, or go on from the last checkpoint, and save."""
    settings = training_arguments(args.output_dir / args.stage, args)
    trainer = AlmanacTrainer(model=model, args=settings, train_dataset=data, data_collator=first, guide=guide)
    folder = Path(str(settings.output_dir))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)
    trainer.save_model(str(folder))


def first(items: list[Any]) -> Any:
    """The collator: an item is a batch already."""
    return items[0]


def policy_of(model: RefragModel) -> nn.Module:
    """The learned policy that these models have."""
    assert model.policy is not None
    return model.policy


def tokenizers(folder: Path) -> tuple[Any, Any]:
    """The two tokenizers, made once and kept in the run's folder."""
    if not (folder / "tokenizer" / "tokenizer.json").exists():
        decoder_tokenizer, encoder_tokenizer = train_tokenizers()
        encoder_tokenizer.save_pretrained(folder / "encoder_tokenizer")
        decoder_tokenizer.save_pretrained(folder / "tokenizer")
    return AutoTokenizer.from_pretrained(folder / "tokenizer"), AutoTokenizer.from_pretrained(folder / "encoder_tokenizer")


def decoder_config(tokenizer: Any) -> LlamaConfig:
    """A LLaMA of four million parameters. With heads of 32 the usual rope base leaves too few slow dimensions to match a name far away."""
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=4096, tie_word_embeddings=True, initializer_range=0.04, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def encoder_config(tokenizer: Any) -> RobertaConfig:
    """A RoBERTa of a million parameters, as wide as the decoder."""
    return RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, max_position_embeddings=66,
        type_vocab_size=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.04,
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


STAGES = {"reading": reading, "reconstruction": reconstruction, "mixed": mixed, "polish": polish, "stretch": stretch, "policy": policy, "export": export}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/bundled"))
    parser.add_argument("--start", help="model to go on from, instead of the stage before")
    parser.add_argument("--weights", type=Path, default=Path(__file__).parent / "weights", help="where export writes")
    parser.add_argument("--num-steps", type=int, default=4000)
    parser.add_argument("--batch-passages", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--schedule", default="constant_with_warmup")
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    STAGES[args.stage](args)


if __name__ == "__main__":
    main()
