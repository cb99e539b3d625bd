"""Training speed and memory: the trainer's own step against the bare forward and backward of its decoder and of its encoder.

The step is the project's own, timed from inside by a callback of `RefragTrainer`: the micro-batch is made, the loss and the
gradients computed, the gradient clipped. The optimizer's update is timed apart: bare or not, it is the same. Behind every step
the same decoder runs over as many slots and the same encoder over the same chunks, forward and backward, nothing around them.
"""

import random
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..config import check_whole
from ..encoder import encode_batch, resolve_device
from ..model import RefragModel
from ..text import Passage, PromptBuilder
from ..training.batches import ChunkedDocuments, DocumentBatches, Windows
from ..training.cpt import ContinualPretraining
from ..training.fit import StageData, freeze, make_trainer
from ..training.reconstruction import Reconstruction
from ..training.settings import CptSettings, DocumentSettings, ReconstructionSettings
from .child import measure_points
from .provenance import peak_rss_bytes
from .rounds import Samples, frozen_garbage, percentiles, ratios, synchronise
from .settings import TrainingSpeedSettings
from .shapes import random_refrag, vocabulary

RATIOS = {"step_over_parts": ("step", "parts")}
"""Making the batch, forward, backward and clipping ÷ forward and backward of the bare decoder and encoder."""

PARTS = ("batch", "step", "optimizer", "decoder", "encoder", "parts")
WARM_UP = 2


def run(settings: TrainingSpeedSettings) -> dict[str, Any]:
    """Measure every context length, with and without gradient checkpointing; returns the content of a results file, of kind `training`.

    Raises BackendError when no point could be measured.
    """
    modes = {"off": (False,), "on": (True,), "both": (False, True)}[settings.gradient_checkpointing]
    points = [
        ({"context_tokens": tokens, "gradient_checkpointing": mode}, (measure, settings, tokens, mode)) for tokens in settings.context_tokens for mode in modes
    ]
    return measure_points("training", points, settings=settings)


def measure(settings: TrainingSpeedSettings, context_tokens: int, gradient_checkpointing: bool) -> dict[str, Any]:
    """One point: seconds of the step and of its parts, their ratio, and the most memory that training needs."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = resolve_device(settings.device)
    model = random_refrag(settings.shape, settings.encoder_shape, chunk_size=settings.chunk_size, dtype=torch.float32, device=device, seed=settings.seed).train()
    before = _peak_bytes()
    with tempfile.TemporaryDirectory(prefix="refrag-bench-") as folder:
        stage = stage_settings(settings, context_tokens, gradient_checkpointing, Path(folder))
        trainer, _ = make_trainer(model, stage_data(model, stage), stage)
        probe = Probe(trainer, settings, num_chunks=settings.batch_size * context_tokens // settings.chunk_size)
        trainer.add_callback(probe)
        with frozen_garbage():
            trainer.train()
    found = ratios(probe.samples, RATIOS, settings.tolerance)
    return {
        "slots": probe.slots,
        "chunks": probe.num_chunks,
        "precision": trainer.accelerator.mixed_precision,
        "systems": {name: percentiles(own) for name, own in probe.samples.items()},
        "ratios": found,
        "steady": all(ratio["steady"] for ratio in found.values()),
        "rounds": len(probe.samples["step"].seconds),
        "peak_memory_bytes": probe.peak_bytes,
        "model_memory_bytes": before,
    }


def stage_settings(settings: TrainingSpeedSettings, context_tokens: int, gradient_checkpointing: bool, folder: Path) -> DocumentSettings:
    """Settings of the stage with every context at full length and all of it compressed; nothing is saved."""
    kind = {"reconstruction": ReconstructionSettings, "cpt": CptSettings}[settings.stage]
    own: dict[str, Any] = {"output_tokens": settings.output_tokens, "mixed_share": 0.0} if settings.stage == "cpt" else {}
    return kind(
        data=("random words",),
        output_dir=folder,
        num_steps=settings.max_repeats + WARM_UP + 1,  # the callback ends the training before the last step, which would be saved
        batch_size=settings.batch_size,
        max_chunks=context_tokens // settings.chunk_size,
        curriculum="none",
        gradient_checkpointing=gradient_checkpointing,
        precision=settings.precision,
        save_every=1 << 30,
        log_every=1 << 30,
        device=settings.device,
        seed=settings.seed,
        **own,
    )


def stage_data(model: RefragModel, stage: Any) -> StageData:
    """Documents of random words, each as long as a window, through the stage's own batches."""
    kind = {ReconstructionSettings: Reconstruction, CptSettings: ContinualPretraining}[type(stage)]
    freeze(model.policy)
    if kind is Reconstruction:
        freeze(model.decoder)
    batches = kind(model, stage, num_items=stage.num_steps)
    words, rng = vocabulary(stage.seed), random.Random(stage.seed)
    size = batches.num_chunks * model.config.chunk_size
    documents = [Passage(id=f"d{number}", text=" ".join(rng.choices(words, k=size))) for number in range(2 * stage.batch_size)]
    windows = Windows(ChunkedDocuments(documents, PromptBuilder(model.tokenizer, chunk_size=model.config.chunk_size)), batches.num_chunks, pack=True, seed=stage.seed)
    return StageData(DocumentBatches(batches, windows, num_items=stage.num_steps, batch_size=stage.batch_size), None, stage.num_steps, windows.counts)


class Probe(TrainerCallback):
    """Times the steps of a trainer from inside, and behind each the bare decoder and encoder; ends the training when that is steady."""

    def __init__(self, trainer: Any, settings: TrainingSpeedSettings, *, num_chunks: int) -> None:
        check_whole("num_chunks", num_chunks, minimum=1)
        self.trainer, self.settings, self.num_chunks = trainer, settings, num_chunks
        self.samples = {name: Samples() for name in PARTS}
        self.peak_bytes: int | None = None
        self.slots = 0
        self._last = _now()
        self._marks: list[tuple[float, float]] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """The first batch is made now."""
        self._last = _now()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """The batch is ready."""
        self._marks = [_now()]

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Gradients are there, and clipped."""
        self._marks.append(_now())

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The weights have moved."""
        self._marks.append(_now())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Keep the times, run the bare parts, and stop when the ratio is steady or the rounds are over."""
        number = state.global_step - WARM_UP
        if number == 0:  # of the training alone, weights, gradients and the optimizer's state included
            self.peak_bytes = _peak_bytes()
        if number >= 0:
            bare = self._bare()
        if number > 0:
            begin, computed, stepped = self._marks
            spent = {"batch": _less(begin, self._last), "optimizer": _less(stepped, computed), **bare}
            spent["step"] = _plus(spent["batch"], _less(computed, begin))
            spent["parts"] = _plus(spent["decoder"], spent["encoder"])
            for name, (wall, cpu) in spent.items():
                self.samples[name].seconds.append(wall)
                self.samples[name].cpu_s.append(cpu)
        found = ratios(self.samples, RATIOS, self.settings.tolerance) if number >= self.settings.min_repeats else {}
        control.should_training_stop = number >= self.settings.max_repeats or any(ratio["steady"] for ratio in found.values())
        self._last = _now()
        return control

    def _bare(self) -> dict[str, tuple[float, float]]:
        """(wall, CPU) seconds of forward and backward of the decoder alone and of the encoder alone, as large as in the step."""
        model, batch = self.trainer.model, self.trainer._batches[-1]
        layout = batch["layout"]
        self.slots = max(layout.num_slots)
        ids = torch.randint(3, len(model.tokenizer), (len(layout.num_slots), self.slots), device=model.device)
        times = {}
        for name, forward in (("decoder", lambda: _decoder_loss(model, ids)), ("encoder", lambda: _encoder_loss(model, batch, self.num_chunks))):
            start = _now()
            with self.trainer.accelerator.autocast():
                loss = forward()
            loss.backward()
            times[name] = _less(_now(), start)
            model.zero_grad()
        return times


def _decoder_loss(model: RefragModel, ids: torch.Tensor) -> torch.Tensor:
    """Next-token loss of the decoder alone; with frozen weights the gradient goes to its inputs, as in reconstruction."""
    embeds = model.get_input_embeddings()(ids)
    logits = model.decoder(inputs_embeds=embeds if embeds.requires_grad else embeds.requires_grad_()).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def _encoder_loss(model: RefragModel, batch: Mapping[str, Any], num_chunks: int) -> torch.Tensor:
    """The chunks that are no padding, pooled and summed up."""
    ids, mask = (batch[name][:num_chunks] for name in ("encoder_input_ids", "encoder_attention_mask"))
    return encode_batch(model.encoder, ids, mask, model.config.pooling).float().sum()


def _now() -> tuple[float, float]:
    """(wall, CPU) seconds, when the device has done what it was asked to."""
    synchronise()
    return time.perf_counter(), time.process_time()


def _less(end: tuple[float, float], start: tuple[float, float]) -> tuple[float, float]:
    return end[0] - start[0], end[1] - start[1]


def _plus(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    return first[0] + second[0], first[1] + second[1]


def _peak_bytes() -> int | None:
    """Most memory so far: of the GPU where there is one, else of this process."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss_bytes()


def summary(content: Mapping[str, Any]) -> str:
    """The result as a few lines of text."""
    lines = [f"{'context':>8}  {'checkpoints':<12}{'step s':>8}{'÷ parts':>9}{'optimizer s':>13}{'peak MiB':>10}"]
    for point in content["points"]:
        start = f"{point['context_tokens']:>8}  {'yes' if point['gradient_checkpointing'] else 'no':<12}"
        if "failed" in point:
            lines.append(f"{start}  not measured ({point['failed']})")
            continue
        systems, ratio = point["systems"], point["ratios"]["step_over_parts"]
        peak = "" if point["peak_memory_bytes"] is None else f"{point['peak_memory_bytes'] / 2**20:,.0f}"
        lines.append(
            f"{start}{systems['step']['p50_s']:>8.3f}{ratio['median']:>9.3f}{systems['optimizer']['p50_s']:>13.3f}{peak:>10}"
            + ("" if ratio["steady"] else f"  NOT STEADY after {point['rounds']} rounds")
        )
    return "\n".join(lines)
