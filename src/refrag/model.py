"""RefragConfig and RefragModel: encoder + projector + policy + decoder, as one Hugging Face model."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from . import hub
from .config import resolve_model
from .encoder import POOLINGS, Projector, encode_batch, encode_texts, fastest_dtype, resolve_device
from .errors import BackendError, InputError, NotFoundError, first_line
from .layout import Layout, MixedInputs, mix
from .policy import MlpPolicy, TransformerPolicy
from .text import Prompt

POLICY_DEFAULTS = {"kind": "transformer", "hidden_width": 256, "num_layers": 2, "num_heads": 4, "question_aware": True, "trained": False}
"""`RefragConfig.policy`; kind is `transformer`, `mlp` or `none`."""

LARGE_MODEL = 50_000_000
"""From this number of parameters on, `dtype="auto"` takes the device's fastest type; below, float32 costs little."""

MAX_LOGITS = 1 << 27
"""Logits computed at a time by `chunk_perplexity`: 512 MiB in float32."""


class RefragConfig(PretrainedConfig):
    """What travels with the weights."""

    model_type = "refrag"
    sub_configs = {"encoder_config": AutoConfig, "decoder_config": AutoConfig}  # noqa: RUF012
    has_no_defaults_at_init = True

    encoder_config: Any = None
    decoder_config: Any = None
    chunk_size: int = 16
    """Tokens per chunk."""
    chunk_sizes: list[int] | None = None
    """What `chunk_size` may be set to when the model is loaded: the sizes its weights were trained with. None: only `chunk_size`."""
    pooling: str = "cls"
    """How the encoder's token vectors become one vector per chunk: `cls` or `mean`."""
    projector_width: int | None = None
    """The projector's hidden width; None: 4 x the decoder's (the paper's is the decoder's)."""
    policy: Any = None
    """Keys as in POLICY_DEFAULTS, which fill up what is missing."""
    expand_fraction: float = 0.1
    """Share of the chunks that a policy expands when no budget is given."""
    encoder_name: str | None = None
    encoder_revision: str | None = None
    decoder_name: str | None = None
    """Where the parts came from: what an adapter loads its decoder from."""
    decoder_revision: str | None = None
    lora: Any = None
    """LoRA layers of the decoder: fields of `peft.LoraConfig`."""
    parts: str = "all"
    """`all`, or `adapter` for a folder without the decoder's own weights."""

    def __init__(self, **kwargs: Any) -> None:
        """Raises InputError for a chunk size below 1, an unknown pooling, and policy settings that do not exist."""
        parts = {name: kwargs.pop(name, None) for name in self.sub_configs}  # set last: transformers resets the attention of those it finds
        super().__init__(**{name: getattr(type(self), name) for name in type(self).__annotations__} | kwargs)
        for name, part in parts.items():
            setattr(self, name, AutoConfig.for_model(**part) if isinstance(part, dict) else part)
        if kwargs.get("attn_implementation") is not None:
            self._attn_implementation = kwargs["attn_implementation"]
        self.policy = POLICY_DEFAULTS | (self.policy or {})
        if not isinstance(self.chunk_size, int) or self.chunk_size < 1:
            raise InputError(f"chunk_size must be a whole number of 1 or more, was {self.chunk_size!r}: try 16.")
        if self.chunk_sizes is not None and self.chunk_size not in self.chunk_sizes:
            raise InputError(f"chunk_size must be one of chunk_sizes, {self.chunk_sizes}, was {self.chunk_size}.")
        if self.pooling not in POOLINGS:
            raise InputError(f"pooling must be one of {', '.join(POOLINGS)}, was {self.pooling!r}.")
        if not 0 <= self.expand_fraction <= 1:
            raise InputError(f"expand_fraction must lie between 0 and 1, was {self.expand_fraction}: try 0.1.")
        if self.policy.keys() != POLICY_DEFAULTS.keys() or self.policy["kind"] not in ("transformer", "mlp", "none"):
            raise InputError(f"policy must have the keys {', '.join(POLICY_DEFAULTS)} and kind transformer, mlp or none, was {self.policy}.")

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """The decoder's config: what generation and cache code asks for."""
        return self if self.decoder_config is None else self.decoder_config


class RefragModel(PreTrainedModel, GenerationMixin):
    """A decoder that reads chunks as tokens or as one projected encoder vector each (paper section 2).

    `tokenizer` (the decoder's) and `encoder_tokenizer` are saved and loaded with the weights; None where unknown.
    """

    config: RefragConfig
    encoder: Any
    decoder: Any
    projector: Projector
    policy: MlpPolicy | TransformerPolicy | None
    tokenizer: Any
    encoder_tokenizer: Any
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: RefragConfig, encoder: nn.Module | None = None, decoder: nn.Module | None = None) -> None:
        """Parts that are not given are built from the config with random weights (on the meta device too)."""
        if config.encoder_config is None or config.decoder_config is None:
            raise InputError("A RefragConfig needs encoder_config and decoder_config: use RefragModel.from_parts(encoder, decoder).")
        super().__init__(config)
        self.tokenizer = self.encoder_tokenizer = None
        self.encoder = _without_pooler(_keep_weights(encoder) or AutoModel.from_config(config.encoder_config))
        self.decoder = _keep_weights(decoder) or AutoModelForCausalLM.from_config(config.decoder_config)
        config.encoder_config, config.decoder_config = self.encoder.config, self.decoder.config
        width = self.decoder.get_input_embeddings().embedding_dim
        self.projector = Projector(self.encoder.config.hidden_size, width, config.projector_width or 4 * width)
        self.policy = _build_policy(config.policy, self.encoder.config.hidden_size)
        if config.lora:
            self._inject_lora(hub.import_peft().LoraConfig(**config.lora))
        self.post_init()
        if not self.get_input_embeddings().weight.is_meta:
            self.projector.calibrate(self.token_embedding_rms())

    @classmethod
    def from_parts(
        cls,
        encoder: Any,
        decoder: Any,
        *,
        encoder_tokenizer: Any = None,
        decoder_tokenizer: Any = None,
        part_kwargs: dict[str, Any] | None = None,
        **settings: Any,
    ) -> "RefragModel":
        """A model around a pretrained encoder and decoder: names, folders, or modules. Tokenizers of named parts are loaded with them.

        `part_kwargs` go to both parts' `from_pretrained` (dtype, device_map, attn_implementation, …), `settings` to RefragConfig.
        """
        encoder, encoder_tokenizer = _load_part("encoder", encoder, encoder_tokenizer, settings, part_kwargs or {})
        decoder, decoder_tokenizer = _load_part("decoder", decoder, decoder_tokenizer, settings, part_kwargs or {})
        model = cls(RefragConfig(encoder_config=encoder.config, decoder_config=decoder.config, **settings), encoder, decoder)
        model.projector.to(decoder.device, decoder.dtype)
        if model.policy is not None:
            model.policy.to(encoder.device)
        model.encoder_tokenizer, model.tokenizer = encoder_tokenizer, decoder_tokenizer
        hub.check_parts(model)
        return model

    # ── parts ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def get_input_embeddings(self) -> Any:
        """The decoder's token embeddings."""
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's token embeddings."""
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        """The decoder's output layer."""
        return self.decoder.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the decoder's output layer."""
        self.decoder.set_output_embeddings(new_embeddings)

    @property
    def generation_config(self) -> Any:
        """The decoder's: one place for it."""
        return self.decoder.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        if "decoder" in self._modules:  # transformers sets a default one before there is a decoder
            self.decoder.generation_config = value

    def _init_weights(self, module: nn.Module) -> None:
        """transformers calls this for every module outside encoder and decoder, children first."""
        if isinstance(module, Projector | MlpPolicy | TransformerPolicy):
            module.reset_parameters()

    @torch.no_grad()
    def token_embedding_rms(self) -> float:
        """Root mean square of the decoder's token embeddings, over at most 4,096 of them."""
        embedding = self.get_input_embeddings()
        ids = torch.arange(0, embedding.num_embeddings, max(1, embedding.num_embeddings // 4096), device=embedding.weight.device)
        return embedding(ids).float().square().mean().sqrt().item()

    def add_lora(self, lora: Any) -> None:
        """Add trainable LoRA layers (a `peft.LoraConfig`) to the decoder and freeze its own weights; saved and loaded with the model."""
        self._inject_lora(lora)
        self.config.lora = hub.lora_settings(lora)

    def _inject_lora(self, lora: Any) -> None:
        self.decoder.add_adapter(lora)
        for name, module in self.decoder.named_modules():
            if ".lora_" in name and not any(weight.is_meta for weight in module.parameters()):
                module._is_hf_initialized = True  # else post_init would draw them anew, and B must stay zero

    @property
    def has_trained_policy(self) -> bool:
        """Whether `--policy learned` means anything for this model."""
        return self.policy is not None and bool(self.config.policy["trained"])

    # ── the flow ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def encode(self, texts: Sequence[str], **kwargs: Any) -> Float[Tensor, "chunk enc"]:
        """Chunk texts -> chunk vectors, float32 on the encoder's device, without gradient; `kwargs` as in `encode_texts`."""
        if self.encoder_tokenizer is None:
            raise InputError("Texts can only be encoded with the encoder's tokenizer, this model has none: set model.encoder_tokenizer.")
        return encode_texts(self.encoder, self.encoder_tokenizer, texts, pooling=self.config.pooling, **kwargs)

    def project(self, chunk_embeds: Float[Tensor, "chunk enc"]) -> Float[Tensor, "chunk hidden"]:
        """Chunk vectors -> vectors at the decoder's width, in the type of its token embeddings."""
        return self.projector(chunk_embeds.to(_device(self.projector.up))).to(self.get_input_embeddings().weight.dtype)

    def mix(self, layout: Layout, chunk_embeds: Float[Tensor, "chunk enc"]) -> MixedInputs:
        """The decoder's inputs for a layout; one row of `chunk_embeds` per chunk, expanded ones too."""
        embedding = self.get_input_embeddings()
        device = _device(embedding)
        return mix(layout.to(device), embedding, self.project(chunk_embeds).to(device))

    def forward(
        self,
        input_ids: Int[Tensor, "batch slot"] | None = None,
        *,
        layout: Layout | None = None,
        chunk_embeds: Float[Tensor, "chunk enc"] | None = None,
        encoder_input_ids: Int[Tensor, "chunk token"] | None = None,
        encoder_attention_mask: Int[Tensor, "chunk token"] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (and the loss where the layout has labels) of the decoder over a layout.

        Chunk vectors are given (`chunk_embeds`) or encoded here with gradient (`encoder_input_ids`). Without a layout
        the call goes to the decoder as it is: `input_ids` or `inputs_embeds`, and whatever else it takes.
        """
        if layout is not None:
            if encoder_input_ids is not None:
                chunk_embeds = encode_batch(self.encoder, encoder_input_ids, encoder_attention_mask, self.config.pooling)
            mixed = self.mix(layout, self._no_chunks() if chunk_embeds is None else chunk_embeds)
            inputs = {"inputs_embeds": mixed.inputs_embeds, "attention_mask": mixed.attention_mask, "position_ids": mixed.position_ids}
            kwargs = inputs | {"labels": mixed.labels if layout.has_labels else None} | kwargs
        return self.decoder(input_ids=input_ids, **kwargs)

    def _no_chunks(self) -> Float[Tensor, "chunk enc"]:
        return torch.zeros(0, self.encoder.config.hidden_size)

    def generate(self, *args: Any, layout: Layout | None = None, chunk_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        """`decoder.generate`, over a (left-padded) layout where one is given: then only the new tokens come back."""
        if layout is not None:
            with torch.no_grad():
                mixed = self.mix(layout, self._no_chunks() if chunk_embeds is None else chunk_embeds)
            kwargs |= {"inputs_embeds": mixed.inputs_embeds, "attention_mask": mixed.attention_mask}
        return self.decoder.generate(*args, **kwargs)

    @torch.no_grad()
    def chunk_perplexity(self, prompt: Prompt) -> Float[Tensor, "chunk"]:
        """Mean negative log-likelihood (nats a token) of each chunk given its passage's earlier tokens, by the decoder.

        What the perplexity rules of the paper's section 3 rank by. Passages are batched; one that is longer than the
        decoder's positions is read in several windows.
        """
        device, vocab = _device(self.get_input_embeddings()), self.get_input_embeddings().num_embeddings
        total, count = torch.zeros(2, len(prompt.chunks), device=device)
        windows = sorted(self._windows(prompt), key=len, reverse=True)
        start = 0
        while start < len(windows):
            size = max(1, MAX_LOGITS // vocab // len(windows[start]))
            pairs = [torch.tensor(window).T for window in windows[start : start + size]]  # [2 token]: ids, chunk of each
            ids, chunk = nn.utils.rnn.pad_sequence([pair.T for pair in pairs], batch_first=True, padding_value=-1).to(device).unbind(-1)
            logits = self.decoder(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long()).logits[:, :-1]
            nll = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].clamp(min=0).flatten(), reduction="none")
            of = chunk[:, 1:].flatten()
            total.index_add_(0, of[of >= 0], nll[of >= 0])
            count.index_add_(0, of[of >= 0], torch.ones_like(nll)[of >= 0])
            start += size
        return total / count.clamp(min=1)

    def _windows(self, prompt: Prompt) -> list[list[tuple[int, int]]]:
        """(token id, chunk) pairs per stretch of a passage that the decoder reads at once, after a start token (chunk -1)."""
        config = self.decoder.config
        limit = getattr(config, "max_position_embeddings", None) or 1 << 30
        first = next((token for token in (config.bos_token_id, config.eos_token_id) if isinstance(token, int)), 0)
        windows: dict[int, list[list[tuple[int, int]]]] = {}
        for chunk in prompt.chunks:
            mine = windows.setdefault(chunk.passage, [[(first, -1)]])
            if len(mine[-1]) > 1 and len(mine[-1]) + len(chunk.token_ids) > limit:
                mine.append([(first, -1)])
            mine[-1].extend((token, chunk.index) for token in chunk.token_ids)
        return [window for mine in windows.values() for window in mine]

    def fingerprint(self) -> dict[str, str | int]:
        """What chunk vectors depend on: an index records it, and refuses a model with another."""
        return {
            "encoder": hub.weights_hash(self.encoder),
            "encoder_tokenizer": hub.tokenizer_hash(self.encoder_tokenizer),
            "decoder_tokenizer": hub.tokenizer_hash(self.tokenizer),
            "chunk_size": self.config.chunk_size,
            "pooling": self.config.pooling,
            "encoder_width": self.encoder.config.hidden_size,
            "projector": hub.weights_hash(self.projector),
        }

    # ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, parts: str = "all", **kwargs: Any) -> None:
        """Write the model and its tokenizers: everything, or (`parts="adapter"`) all but the decoder's own weights.

        The folder is replaced when all files are written. Raises InputError when it cannot be.
        """
        if parts not in ("all", "adapter"):
            raise InputError(f"parts must be 'all' or 'adapter', was {parts!r}.")
        lora = getattr(self.decoder, "peft_config", None)
        if lora:
            self.config.lora = hub.lora_settings(next(iter(lora.values())))
        with hub.written_whole(save_directory) as folder:
            if parts == "adapter":
                hub.save_adapter(self, folder, kwargs.get("state_dict"))
            else:
                self.config.parts = "all"
                super().save_pretrained(folder, *args, **kwargs)
            hub.save_tokenizers(self, folder)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """A saved model or adapter, from a folder or the hub, in eval mode.

        Takes what transformers takes (device_map, dtype, attn_implementation, quantization_config, revision, …) and
        the settings of RefragConfig that the weights do not depend on. Raises NotFoundError when there is no such
        model, MismatchError when weights, config and tokenizers do not belong together.
        """
        with_info = kwargs.pop("output_loading_info", False)
        name = pretrained_model_name_or_path and str(pretrained_model_name_or_path)
        download = {key: kwargs[key] for key in hub.DOWNLOAD_KWARGS if key in kwargs}
        config = kwargs.pop("config", None) or hub.read_config(RefragConfig, name, **download)
        hub.apply_overrides(config, kwargs)
        if config.parts == "adapter":
            model, info = hub.load_adapter(cls, name, config, **kwargs), {}
        else:
            hub.quantize_decoder_only(kwargs)
            kwargs |= {"config": config, "ignore_mismatched_sizes": True, "output_loading_info": True}
            with hub.readable_weights(name):
                loaded: Any = super().from_pretrained(name, *model_args, **kwargs)
            model, info = loaded
            hub.check_loaded(name, info)
        if name is not None:
            model.tokenizer = hub.load_tokenizer(name, **download)
            model.encoder_tokenizer = hub.load_tokenizer(name, hub.ENCODER_TOKENIZER, **download)
            hub.check_tokenizers(model)
        return (model, info) if with_info else model

    def export_decoder(self, folder: str | os.PathLike) -> None:
        """Write the decoder alone, LoRA merged, with its tokenizer, as a plain Hugging Face folder for any engine."""
        hub.export_decoder(self, folder)

    def push_to_hub(self, repo_id: str, *, parts: str = "all", **kwargs: Any) -> str:
        """Upload the model with a card; returns its address. `kwargs`: license, private, token, revision, commit_message, create_pr."""
        return hub.push(self, repo_id, parts=parts, **kwargs)


def _build_policy(settings: dict[str, Any], encoder_width: int) -> MlpPolicy | TransformerPolicy | None:
    kind, width, aware = settings["kind"], settings["hidden_width"], settings["question_aware"]
    if kind == "none":
        return None
    if kind == "mlp":
        return MlpPolicy(encoder_width, width, question_aware=aware)
    return TransformerPolicy(encoder_width, width, num_layers=settings["num_layers"], num_heads=settings["num_heads"], question_aware=aware)


def _device(layer: Any) -> torch.device:
    """Where a layer computes: not where its weights are while `device_map` keeps them elsewhere."""
    weight, hook = layer.weight, getattr(layer, "_hf_hook", None)
    return torch.device(hook.execution_device) if weight.is_meta and hook is not None else weight.device


def _keep_weights(part: Any) -> Any:
    """Mark a given part's modules as initialised: transformers' `post_init` would draw others anew."""
    for module in part.modules() if part is not None else ():
        module._is_hf_initialized = True
    return part


def _without_pooler(encoder: Any) -> Any:
    """Drop the layer that BERT-like encoders put behind the first token: it is never used here, and would get no gradient."""
    if isinstance(getattr(encoder, "pooler", None), nn.Module):
        encoder.pooler = None
    return encoder


def _load_part(part: str, source: Any, tokenizer: Any, settings: dict[str, Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """(module, tokenizer) of the encoder or decoder; the name and commit it came from are noted in `settings`."""
    source = str(source) if isinstance(source, os.PathLike) else source
    hub.check_part(part, source, kwargs | {"revision": settings.get(f"{part}_revision")})
    name = source if isinstance(source, str) else getattr(source, "name_or_path", None)
    if name:
        settings.setdefault(f"{part}_name", name)
        settings[f"{part}_revision"] = hub.commit_of(name, settings.get(f"{part}_revision"))
    if not isinstance(source, str):
        return source, tokenizer
    auto: Any = AutoModel if part == "encoder" else AutoModelForCausalLM
    revision = settings[f"{part}_revision"] or "main"
    try:
        return auto.from_pretrained(source, revision=revision, **kwargs), tokenizer or AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise NotFoundError(f"The {part} {source!r} could not be loaded ({first_line(error)}): check the name or the folder.") from error


def load_model(name: str | os.PathLike[str], *, device: str = "auto", dtype: str | torch.dtype = "auto", kind: type[RefragModel] = RefragModel, **kwargs: Any) -> RefragModel:
    """The model of a name, folder or `bundled`, on a device, in eval mode: what engine and CLI use.

    `dtype="auto"`: float32 for small models, else the type that a probe finds fastest on the device. `kwargs` go to
    `from_pretrained` of RefragModel, or of its subclass `kind`. Raises NotFoundError, MismatchError, and BackendError, which names `--device cpu`.
    """
    target, name = resolve_device(device), resolve_model(name)
    quantized = "quantization_config" in kwargs
    if not quantized:
        kwargs["dtype"] = _dtype(dtype, name, target, {key: kwargs[key] for key in hub.DOWNLOAD_KWARGS if key in kwargs})
    model = kind.from_pretrained(name, **kwargs).eval()
    if model.tokenizer is None or model.encoder_tokenizer is None:
        which = "decoder" if model.tokenizer is None else "encoder"
        raise NotFoundError(f"The model {name!r} has no {which} tokenizer: save it again with model.{'' if which == 'decoder' else 'encoder_'}tokenizer set.")
    if "device_map" in kwargs or quantized:
        return model
    try:
        return model.to(target)
    except RuntimeError as error:  # torch's out-of-memory errors too
        raise BackendError(f"The model could not be put on {target} ({first_line(error)}): run the same command with --device cpu.") from error


def _dtype(dtype: str | torch.dtype, name: str, device: torch.device, download: dict[str, Any]) -> torch.dtype:
    """The torch type of a name; `auto` by the model's size and the device."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        with torch.device("meta"):
            size = RefragModel(hub.read_config(RefragConfig, name, **download)).num_parameters()
        return fastest_dtype(device) if size >= LARGE_MODEL else torch.float32
    known = getattr(torch, {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(dtype, dtype), None)
    if not isinstance(known, torch.dtype) or not known.is_floating_point:
        raise InputError(f"dtype must be auto, float32, bfloat16 or float16, was {dtype!r}.")
    return known


AutoConfig.register("refrag", RefragConfig)
AutoModel.register(RefragConfig, RefragModel)
AutoModelForCausalLM.register(RefragConfig, RefragModel)
