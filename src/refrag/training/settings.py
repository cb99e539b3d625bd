"""Settings of the training stages: plain dataclasses, without torch or transformers, so that the CLI can show them at once.

Names are those of the command line (`--learning-rate` is `learning_rate`). Stages map them onto `transformers.TrainingArguments`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config import BUNDLED_MODEL, check_whole
from ..errors import InputError

Stage = Literal["reconstruction", "cpt", "sft", "policy"]
Curriculum = Literal["paper", "prototype", "none"]
"""`paper`: nine stages over 1, 2, 4 … 256 units with the mixture of the paper's Table 8; `prototype`: 1, 2, 4 chunks, a third of training each; `none`: the longest at once."""


SETTINGS_FILE, LOG_FILE, RESULT_FILE, MODEL_FOLDER, BEST_LINK = "settings.json", "log.jsonl", "result.json", "model", "best"
"""What the folder of a run holds, beside its checkpoints."""

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")

WITHOUT_EFFECT = frozenset(("resume", "dry_run", "keep", "log_every", "report_to", "device", "output_dir", "save_every", "patience", "skip_bad"))
"""Settings that may change when a run goes on."""


@dataclass(frozen=True)
class TrainSettings:
    """What all stages share."""

    data: tuple[str, ...] = ()
    """Files and folders (json, jsonl, txt, parquet, .gz too), saved data sets, or names on the Hugging Face hub."""
    output_dir: Path = Path("runs/train")
    """Folder of checkpoints, logs, the report, and (in `model/`) the trained model."""
    model: str | None = None
    """REFRAG model to start from: a folder, a hub name, or `bundled`."""
    encoder: str | None = None
    """Instead of --model: pretrained encoder, a folder or hub name."""
    decoder: str | None = None
    """Instead of --model: pretrained decoder, a folder or hub name."""
    chunk_size: int | None = None
    """Tokens per chunk, k, of a model built from --encoder and --decoder (None: 16); with --model it must be the model's own."""
    pooling: Literal["cls", "mean"] | None = None
    """Pooling of a model built from --encoder and --decoder; None: cls."""
    projector_width: int | None = None
    """Hidden width of its projector; None: 4 x the decoder's (the paper's is the decoder's)."""
    resume: bool = True
    """Go on from the last checkpoint in --output-dir, if there is one made with the same settings."""
    eval_data: tuple[str, ...] = ()
    """Data that is only evaluated on; none of its rows may be in --data. Without it a share of --data is held out."""
    eval_fraction: float = 0.02
    """Share of --data held out by the hash of each row, where there is no --eval-data."""
    skip_bad: bool = False
    """Leave out rows that cannot be read, and say how many, instead of stopping at the first."""
    streaming: bool = False
    """Read the data as a stream, in its order, without counting it first; needs --num-steps."""
    text_field: str = "text"
    """Field of a document's text."""
    num_steps: int | None = None
    """Optimizer steps; None: as many as --num-epochs has."""
    num_epochs: float = 1.0
    """Passes over the data, where --num-steps is not given."""
    batch_size: int = 8
    """Rows per device and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """What the learning rate does after warm-up."""
    warmup: float = 0.04
    """Warm-up: a share of the steps (below 1), or a number of steps."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: they are not."""
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    """adamw_8bit needs bitsandbytes and a GPU."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast type over fp32 master weights; auto: bf16 where the device has it, else fp32. fp16 scales the loss."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    torch_compile: bool = False
    """Compile the model."""
    fsdp: bool = False
    """Shard weights, gradients and optimizer state over the processes (FSDP2): several GPUs, started by torchrun. Without it every GPU holds the whole model (DDP)."""
    lora_rank: int = 0
    """Rank of LoRA layers on the decoder, whose own weights are then frozen; 0: none."""
    lora_encoder: bool = False
    """LoRA layers of the same rank on the encoder too."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept, the best one beside them."""
    eval_every: int = 0
    """Steps between evaluations; 0: at each checkpoint."""
    eval_rows: int = 200
    """Most rows to evaluate on."""
    patience: int = 0
    """Stop after so many evaluations without a better result; 0: never."""
    log_every: int = 10
    """Steps between log entries."""
    report_to: tuple[str, ...] = ()
    """Trackers of transformers: tensorboard, wandb, mlflow, trackio."""
    seed: int = 0
    """Seed of data order, of what is expanded, and of new weights."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train."""
    dry_run: bool = False
    """Resolve and print every setting and the model's shape, then stop."""

    def __post_init__(self) -> None:
        """Raises InputError for values that cannot be trained with."""
        for name in ("batch_size", "gradient_accumulation_steps", "save_every", "log_every", "keep"):
            check_whole(name, getattr(self, name), minimum=1)
        for name in ("lora_rank", "eval_every", "patience", "seed", "eval_rows"):
            check_whole(name, getattr(self, name), minimum=0)
        if self.model is not None and (self.encoder is not None or self.decoder is not None):
            raise InputError("A run starts from --model or from --encoder and --decoder, both were given: keep one.")
        if (self.encoder is None) != (self.decoder is None):
            raise InputError("A new model needs both --encoder and --decoder, one was given: name the other.")
        if self.chunk_size is not None:
            check_whole("chunk_size", self.chunk_size, minimum=1)
        if not 0 <= self.eval_fraction < 1:
            raise InputError(f"eval_fraction must be 0 or more and below 1, was {self.eval_fraction}: try 0.02.")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must lie above 0, and be finite, was {self.learning_rate}: try 2e-4.")
        if not 0 <= self.warmup < math.inf:
            raise InputError(f"warmup must be 0 or more, was {self.warmup}: try 0.04.")
        if (self.num_steps is not None and self.num_steps < 1) or not 0 < self.num_epochs < math.inf:
            raise InputError(f"A run must take one optimizer step or more, num_steps was {self.num_steps} and num_epochs {self.num_epochs}: raise the one that is too small.")
        if self.num_steps is not None and self.warmup_steps(self.num_steps) > self.num_steps:
            raise InputError(f"Warm-up must not be longer than training, was {self.warmup:g} steps of {self.num_steps}: lower --warmup or raise --num-steps.")
        if self.schedule == "constant" and self.warmup not in (0, TrainSettings.warmup):
            raise InputError(f"The schedule constant has no warm-up, --warmup was {self.warmup:g}: choose --schedule constant_with_warmup, or leave --warmup out.")
        if self.streaming and self.num_steps is None:
            raise InputError("A stream has no length, so --streaming needs --num-steps: pass --num-steps.")
        self._check_optimizer()
        self._check_evaluation()

    def _check_optimizer(self) -> None:
        if not 0 <= self.max_grad_norm < math.inf:
            raise InputError(f"max_grad_norm must be 0 or more, and finite, was {self.max_grad_norm}: try 1.")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay must be 0 or more, and finite, was {self.weight_decay}: try 0.")
        if self.lora_encoder and not self.lora_rank:
            raise InputError("lora_encoder needs a rank, lora_rank was 0: pass --lora-rank 16, or leave --lora-encoder out.")

    def _check_evaluation(self) -> None:
        if self.eval_every and self.save_every % self.eval_every:
            raise InputError(f"--save-every must be a multiple of --eval-every, were {self.save_every} and {self.eval_every}: a checkpoint is judged by an evaluation.")
        if self.patience and not (self.eval_rows and (self.eval_data or self.eval_fraction)):
            raise InputError(f"patience counts evaluations, and nothing would be evaluated: leave --patience {self.patience} out, or give --eval-data, or an --eval-fraction and --eval-rows above 0.")
        for name in self.report_to:
            if name not in TRACKERS:
                raise InputError(f"report_to must be among {', '.join(TRACKERS)}, was {name!r}.")

    def warmup_steps(self, num_steps: int) -> int:
        """Warm-up in steps: `warmup` below 1 is a share."""
        return int(self.warmup * num_steps) if self.warmup < 1 else int(self.warmup)

    @property
    def start(self) -> str:
        """The model to start from."""
        return self.model or BUNDLED_MODEL


@dataclass(frozen=True)
class DocumentSettings(TrainSettings):
    """What the two stages over plain documents share."""

    curriculum: Curriculum = "paper"
    """How the number of chunks grows over training."""
    max_chunks: int = 256
    """Chunks of the longest context; not limited by the decoder's window, since slots are what counts."""
    short_documents: Literal["pack", "drop"] = "pack"
    """Documents shorter than a window are put together, each its own passage, or dropped; either is counted and shown."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("max_chunks", self.max_chunks, minimum=1)


@dataclass(frozen=True)
class ReconstructionSettings(DocumentSettings):
    """Reconstruction (paper section 2): L chunk vectors in, all L*k tokens out; the decoder is frozen."""

    learning_rate: float = 2e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank and not self.lora_encoder:
            raise InputError("Reconstruction freezes the decoder, so LoRA layers on it would learn nothing: add --lora-encoder, or leave --lora-rank out.")


@dataclass(frozen=True)
class CptSettings(DocumentSettings):
    """Continual pre-training: context compressed, the next tokens predicted; everything trained, then with mixed inputs."""

    learning_rate: float = 5e-5
    output_tokens: int | None = None
    """Tokens to predict after the context, o; None: as many as the context has."""
    mixed_share: float = 0.5
    """Share of training, at its end, in which some chunks are left as tokens; 0: none."""
    expand_fractions: tuple[float, ...] = (0.05, 0.1, 0.15)
    """Shares of the chunks left as tokens, one after the other over the mixed part (the prototype's; the paper's is 0.1)."""
    expand_range: tuple[float, float] | None = None
    """Instead: a share drawn from this range for each row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output_tokens is not None:
            check_whole("output_tokens", self.output_tokens, minimum=1)
        for fraction in (self.mixed_share, *self.expand_fractions, *(self.expand_range or ())):
            if not 0 <= fraction <= 1:
                raise InputError(f"mixed_share, expand_fractions and expand_range must lie between 0 and 1, one was {fraction}: try 0.1.")
        if not self.expand_fractions:
            raise InputError("expand_fractions must hold one share or more, none was given: try 0.1.")
        if self.expand_range is not None and self.expand_fractions != CptSettings.expand_fractions:
            raise InputError("The shares of the mixed part are drawn from expand_range or taken from expand_fractions, both were given: leave one out.")
        _check_range(self.expand_range)


@dataclass(frozen=True)
class SftSettings(TrainSettings):
    """Fine-tuning on questions with passages: loss on the answer only, passages shuffled unless `keep_order`, budgets drawn at random."""

    learning_rate: float = 2e-5
    num_passages: int = 8
    """Passages per question: the gold ones, then distractors up to this number."""
    keep_order: bool = False
    """Leave the passages in the order of the row, for answers that follow it, such as summaries; else they are shuffled."""
    full_share: float = 0.1
    """Share of rows with every chunk expanded, so that plain RAG stays as good."""
    none_share: float = 0.3
    """Share of rows with nothing expanded."""
    gold_share: float = 0.3
    """Share of rows in which the chunks that hold the answer are expanded, as a good policy would."""
    expand_range: tuple[float, float] = (0.0, 0.3)
    """Share of the chunks expanded at random in all other rows."""
    max_answer_tokens: int = 128
    """Longer answers are cut, without an end, and counted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("num_passages", self.num_passages, minimum=1)
        check_whole("max_answer_tokens", self.max_answer_tokens, minimum=1)
        for share in (self.full_share, self.none_share, self.gold_share, *self.expand_range):
            if not 0 <= share <= 1:
                raise InputError(f"full_share, none_share, gold_share and expand_range must lie between 0 and 1, one was {share}: try 0.3.")
        _check_range(self.expand_range)
        if self.full_share + self.none_share + self.gold_share > 1:
            raise InputError("full_share, none_share and gold_share must not sum to more than 1: lower one.")


@dataclass(frozen=True)
class PolicySettings(TrainSettings):
    """The expansion policy (paper section 3): which T' = floor(p*L) chunks to expand; encoder and decoder are frozen."""

    learning_rate: float = 1e-3
    objective: Literal["grouped", "reinforce", "supervised"] = "grouped"
    """`grouped`: the paper's clipped objective over G samples; `reinforce`: the prototype's; `supervised`: only from marked gold passages."""
    supervised_steps: int = 0
    """Steps of a supervised start, where gold passages or answers are marked, before the objective."""
    group_size: int = 8
    """Samples per input, G."""
    updates_per_rollout: int = 2
    """Optimizer steps on each rollout: from two on, clipping is real."""
    clip: float = 0.2
    """The probability ratio is clipped to 1 - clip … 1 + clip."""
    entropy_weight: float = 0.0
    """Weight of an entropy bonus."""
    expand_fractions: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Budgets p, one drawn for each rollout."""
    context_tokens: int = 1024
    """For plain documents: tokens of the context, s."""
    output_tokens: int = 128
    """For plain documents: tokens predicted after it, o; rewards are their negative log-perplexity."""
    num_passages: int = 8
    """For questions: passages, the gold ones among them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("group_size", "updates_per_rollout", "context_tokens", "output_tokens", "num_passages"):
            check_whole(name, getattr(self, name), minimum=1)
        check_whole("supervised_steps", self.supervised_steps, minimum=0)
        if self.lora_rank:
            raise InputError("The policy stage freezes encoder and decoder, so LoRA layers would learn nothing: leave --lora-rank out.")
        if self.group_size < 2 and self.objective == "grouped":
            raise InputError(f"group_size must be 2 or more for the grouped objective, was {self.group_size}: try 8.")
        idle = {"grouped": (), "reinforce": ("clip", "updates_per_rollout"), "supervised": ("clip", "updates_per_rollout", "group_size", "entropy_weight", "supervised_steps")}
        for name in idle[self.objective]:
            if getattr(self, name) != getattr(PolicySettings, name):
                raise InputError(f"{name} changes nothing with the objective {self.objective}: leave it out, or choose --objective grouped.")
        if not math.isfinite(self.entropy_weight):
            raise InputError(f"entropy_weight must be finite, was {self.entropy_weight}: try 0.01.")
        if not 0 < self.clip < 1:
            raise InputError(f"clip must lie between 0 and 1, was {self.clip}: try 0.2.")
        if not self.expand_fractions or any(not 0 < fraction <= 1 for fraction in self.expand_fractions):
            raise InputError(f"expand_fractions must lie above 0 and be at most 1, were {self.expand_fractions}: try 0.1.")


def _check_range(bounds: tuple[float, float] | None) -> None:
    if bounds is not None and bounds[0] > bounds[1]:
        raise InputError(f"expand_range must go from the lower share to the higher, was {bounds[0]} to {bounds[1]}: turn it round.")


def has_begun(folder: Path) -> bool:
    """Whether a run has trained in this folder: else its settings may still change."""
    return (folder / LOG_FILE).exists() or (folder / RESULT_FILE).exists() or any(folder.glob("checkpoint-*"))


STAGE_SETTINGS: dict[str, type[TrainSettings]] = {
    "reconstruction": ReconstructionSettings,
    "cpt": CptSettings,
    "sft": SftSettings,
    "policy": PolicySettings,
}
