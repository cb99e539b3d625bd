"""The prototype's training checkpoints: read without running anything in them, and made into a RefragModel where that is exact."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from ..errors import InputError, MismatchError, NotFoundError, first_line
from ..hub import load_tokenizer
from ..model import RefragModel

PARTS = ("encoder", "projector", "policy")

NOT_CONVERTED = (
    "The encoder, the projector and the decoder came over exactly. The policy did not, since its layers are of another kind: "
    "the model answers with --policy similarity until one is trained. The prompts are refrag's own, with numbered passages."
)
"""What a user should know about a converted model."""

_UNUSED = ("pooler.", "embeddings.position_ids")
"""Beginnings of encoder weights that neither the prototype nor refrag reads."""


@dataclass(frozen=True)
class PrototypeCheckpoint:
    """The parts of a prototype checkpoint, on the CPU: state dicts as they were saved, the encoder's without its `model.`."""

    version: int
    """1: `encoder.pt`, `projector.pt` and perhaps `policy.pt`; 2: `checkpoint.pt`."""
    encoder: dict[str, Tensor]
    projector: dict[str, Tensor]
    policy: dict[str, Tensor]
    config: dict[str, Any]
    """Names and sizes, by the prototype's words; version 1 recorded none."""
    step: int
    decoder_folder: Path | None
    """Hugging Face folder of the decoder, where it was saved."""


def read_checkpoint(folder: str | Path) -> PrototypeCheckpoint:
    """Reads tensors and plain values only, and finds `decoder/`.

    Raises NotFoundError when there is no checkpoint and InputError when it holds anything but the prototype's layout.
    """
    folder = Path(folder)
    path, decoder = folder / "checkpoint.pt", folder / "decoder"
    is_second = path.is_file()
    if not is_second and not (folder / "encoder.pt").is_file():
        raise NotFoundError(f"There is no checkpoint.pt (or encoder.pt) in {folder}: pass a folder that the prototype's training wrote.")
    saved: dict[str, Any] = _load(path) if is_second else {f"{part}_state_dict": _load(own) if (own := folder / f"{part}.pt").is_file() else {} for part in PARTS}
    states = {part: saved.get(f"{part}_state_dict") for part in PARTS}
    missing = [part for part, state in states.items() if not _is_state(state)]
    if missing:
        raise InputError(f"{path} must hold the prototype's parts, lacks the weights of {', '.join(missing)}: pass a folder that its training wrote.")
    config: Any = saved.get("config")
    return PrototypeCheckpoint(
        version=2 if is_second else 1,
        encoder={name.removeprefix("model."): weight for name, weight in saved["encoder_state_dict"].items()},
        projector=saved["projector_state_dict"],
        policy=saved["policy_state_dict"],
        config=config if isinstance(config, dict) else {},
        step=int(saved.get("step") or 0),
        decoder_folder=decoder if (decoder / "config.json").is_file() else None,
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # mapped: the optimizer's state is never read
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"{path} is refused, since it must hold tensors and plain values only: export its state dicts with the prototype's own code.") from error
    return saved if isinstance(saved, dict) else {}


def _is_state(state: Any) -> bool:
    return isinstance(state, dict) and all(isinstance(name, str) and isinstance(weight, Tensor) for name, weight in state.items())


def convert_checkpoint(folder: str | Path, *, encoder: str | None = None, decoder: str | None = None) -> RefragModel:
    """A RefragModel with the encoder, projector and decoder of a version 2 checkpoint; see NOT_CONVERTED.

    A checkpoint holds neither the encoder's config nor any tokenizer: they come from the names in it, or from `encoder` and
    `decoder` (names or folders). Raises InputError for version 1 and for parts that are not the prototype's, MismatchError
    for weights that do not fit, NotFoundError for names that cannot be loaded.
    """
    saved = read_checkpoint(folder)
    if saved.version == 1:
        raise InputError(
            f"{folder} is a version 1 checkpoint: its projector applies tanh where a RefragModel applies GELU, and it does not say "
            "which decoder it belongs to, so it cannot be converted exactly: import its index alone, and train with refrag."
        )
    encoder, decoder = encoder or str(saved.config.get("encoder_name")), decoder or str(saved.config.get("decoder_name"))
    decoder_tokenizer = (saved.decoder_folder and load_tokenizer(str(saved.decoder_folder))) or _named("decoder's tokenizer", AutoTokenizer, decoder)
    module = AutoModel.from_config(_named("encoder", AutoConfig, encoder))
    _fill(module, saved.encoder, f"The encoder of {folder} does not fit {encoder}")
    model = RefragModel.from_parts(
        module,
        str(saved.decoder_folder or decoder),
        encoder_tokenizer=_named("encoder's tokenizer", AutoTokenizer, encoder),
        decoder_tokenizer=decoder_tokenizer,
        encoder_name=encoder,
        chunk_size=int(saved.config.get("chunk_size_k", 16)),
        pooling="cls",
        projector_width=_width(saved, folder),
        expand_fraction=float(saved.config.get("expansion_fraction_p", 0.1)),
    )
    _fill(model.projector, folded(saved.projector), f"The projector of {folder} does not fit its encoder and decoder")
    return model.eval()


def folded(projector: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a `Projector` that computes what the prototype's did.

    The prototype: unit vectors, Linear, GELU, Linear, times `scale`, plus `shift` (older checkpoints have neither). Ours divides
    vectors by their root mean square, so they are sqrt(width) times as long: the first layer is divided by it.
    """
    up, down = projector["projection.0.weight"], projector["projection.2.weight"]
    scale, shift = projector.get("scale", torch.ones(1)), projector.get("shift", torch.zeros(1))
    return {
        "up.weight": up / up.shape[1] ** 0.5,
        "up.bias": projector["projection.0.bias"],
        "down.weight": down * scale,
        "down.bias": projector["projection.2.bias"] * scale + shift,
        "log_scale": torch.zeros(1),
    }


def _width(saved: PrototypeCheckpoint, folder: str | Path) -> int:
    """The projector's hidden width, after a look at its names."""
    layers = {f"projection.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    if saved.projector.keys() - {"scale", "shift"} != layers or saved.projector["projection.0.weight"].dim() != 2:
        raise InputError(f"The projector of {folder} must have the layers Linear, GELU, Linear of the prototype, has {', '.join(sorted(saved.projector))}: train one with refrag.")
    return len(saved.projector["projection.0.bias"])


def _named(what: str, kind: Any, name: str) -> Any:
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise NotFoundError(f"The {what} {name!r}, which the checkpoint names, could not be loaded ({first_line(error)}): put its folder where that name leads.") from error


def _fill(module: torch.nn.Module, state: Mapping[str, Tensor], complaint: str) -> None:
    """Loads every weight, or raises MismatchError with the first that does not fit."""
    wanted = {name: weight for name, weight in module.state_dict().items() if not name.startswith(_UNUSED)}
    given = {name: weight for name, weight in state.items() if not name.startswith(_UNUSED)}
    for name in sorted(wanted.keys() | given.keys()):
        shapes = [tuple(weights[name].shape) if name in weights else "absent" for weights in (given, wanted)]
        if shapes[0] != shapes[1]:
            raise MismatchError(f"{complaint}: {name} is {shapes[0]} in the checkpoint and {shapes[1]} in the model.")
    module.load_state_dict(given, strict=False)
