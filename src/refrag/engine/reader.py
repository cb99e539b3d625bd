"""A model without its decoder's layers: what a process needs that leaves decoding to a server."""

import copy
import os
from typing import Any, NoReturn

from torch import nn

from .. import hub
from ..config import resolve_model
from ..errors import InputError
from ..model import RefragConfig, RefragModel, load_model


class RefragReader(RefragModel):
    """Encoder, projector, policy and the decoder's token embeddings. `config` is the whole model's; the decoder cannot be called."""

    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]  # noqa: RUF012

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises InputError: most of the model is missing."""
        raise _absent()

    def export_decoder(self, folder: str | os.PathLike) -> NoReturn:
        """Raises InputError: most of the decoder is missing."""
        raise _absent()


def load_reader(name: str | os.PathLike[str], **loading: Any) -> RefragModel:
    """As `load_model`, which `loading` goes to, without the decoder's layers and output.

    They are not even read, except those of an adapter or of a model with LoRA. Raises what `load_model` raises.
    """
    download = {key: loading[key] for key in hub.DOWNLOAD_KWARGS if key in loading}
    config = hub.read_config(RefragConfig, resolve_model(name), **download)
    decoder_config = config.decoder_config
    if config.parts == "all" and not config.lora:  # else the parts are put together first
        config.decoder_config = _without_layers(decoder_config)
    model = load_model(name, kind=RefragReader, config=config, **loading)
    model.config.decoder_config = model.decoder.config = decoder_config
    _drop_layers(model.decoder)
    return model


def _without_layers(config: Any) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = 0
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = []
    return config


def _drop_layers(decoder: Any) -> None:
    """Free all weights but the token embeddings', and refuse calls."""
    kept = {id(weight) for weight in decoder.get_input_embeddings().parameters()}
    for module in decoder.modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) not in kept:
                setattr(module, name, nn.Parameter(weight.to("meta"), requires_grad=False))
    decoder.forward = _refuse


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise _absent()


def _absent() -> InputError:
    return InputError(
        "This process holds no decoder, since a server decodes: choose a policy other than perplexity, or load the whole model with refrag.model.load_model."
    )
