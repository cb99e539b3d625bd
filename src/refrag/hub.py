"""What a model folder holds and how it is checked: tokenizers, adapters, exports, hashes, the model card.

    config.json, model.safetensors      the whole model (`parts="all"`)
    config.json, adapter.safetensors    encoder, projector, policy and LoRA; the decoder is named in config.json (`parts="adapter"`)
    tokenizer.json, …                   the decoder's tokenizer
    encoder_tokenizer/                  the encoder's
"""

import copy
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import cached_file

from . import __version__
from .errors import BackendError, InputError, MismatchError, NotFoundError, RefragError, first_line, missing_extra

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter.safetensors"
ENCODER_TOKENIZER = "encoder_tokenizer"
DOWNLOAD_KWARGS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder", "proxies")
EXPORT_MARK = "refrag-decoder.json"
"""Tells an exported decoder's folder from others."""
OUTPUT_LAYERS = ["lm_head", "embed_out"]
"""Names of a decoder's last layer: GPT-NeoX has the second."""
BOUND = ("chunk_size", "chunk_sizes", "pooling", "projector_width", "policy", "encoder_config", "decoder_config")
"""Settings that the weights were trained with: a folder cannot be loaded with others."""


# ── hashes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def weights_hash(module: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 over names, shapes and values, the values rounded to bfloat16.

    Rounded, so that the precision a model is loaded in does not matter.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        rounded = tensor.detach().cpu().to(torch.bfloat16).contiguous()
        digest.update(memoryview(rounded.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()[:16]


def tokenizer_hash(tokenizer: Any) -> str:
    """First 16 hex digits of the SHA-256 of the tokenizer's JSON without its padding and truncation; empty for None."""
    if tokenizer is None:
        return ""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content.pop("padding", None), content.pop("truncation", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


# ── loading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_config(config_class: Any, name: str, **download: Any) -> Any:
    """The RefragConfig of a folder or hub name.

    Raises NotFoundError when there is none, MismatchError when it is another kind of model.
    """
    if (reason := why_unknown(name, **download)) is not None:
        raise NotFoundError(f"No model {name!r} was found here or on the hub ({reason}): check --model.")
    try:
        found, _ = config_class.get_config_dict(name, **download)
    except (OSError, ValueError) as error:
        raise NotFoundError(f"No model {name!r} was found here or on the hub ({first_line(error)}): check --model.") from error
    if not found:
        raise NotFoundError(f"No model {name!r} was found, the folder has no config.json: check --model.")
    if found.get("model_type") != config_class.model_type:
        kind = found.get("model_type") or "unknown"
        raise MismatchError(f"{name!r} is a {kind} model, not a refrag one: wrap it with RefragModel.from_parts(encoder, decoder), or check --model.")
    return config_class.from_dict(found)


def why_unknown(name: str, **download: Any) -> str | None:
    """Why a name is no folder, not in the cache and not on the hub; None where it is one of them. One request, where
    transformers would try each of its own again and again."""
    access = {key: download[key] for key in ("revision", "cache_dir") if download.get(key)}
    if Path(name).exists() or download.get("subfolder"):
        return None
    try:
        if isinstance(try_to_load_from_cache(name, "config.json", **access), str):
            return None
        if download.get("local_files_only"):
            raise FileNotFoundError("it is not in the cache")
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=download.get("revision")), token=download.get("token"))
    except EntryNotFoundError:  # a repository without it, of an adapter for instance
        return None
    except Exception as error:  # the hub's client raises errors of several libraries
        return "the hub cannot be reached" if "Connect" in type(error).__name__ else first_line(error)
    return None


def check_part(part: str, source: Any, loading: Mapping[str, Any]) -> None:
    """Raises NotFoundError for a name of an encoder or decoder that is nowhere; a module is not looked at."""
    if isinstance(source, str) and (reason := why_unknown(source, **{key: loading[key] for key in DOWNLOAD_KWARGS if key in loading})) is not None:
        raise NotFoundError(f"The {part} {source!r} could not be loaded ({reason}): check the name or the folder.")


@contextmanager
def readable_weights(name: str) -> Generator[None]:
    """Raises MismatchError for weights that are cut short or damaged, NotFoundError where there are none."""
    try:
        yield
    except SafetensorError as error:
        raise MismatchError(f"The weights in {name!r} are damaged or incomplete ({first_line(error)}): copy or download them again.") from error
    except OSError as error:
        if isinstance(error, RefragError):
            raise
        raise NotFoundError(f"The weights of {name!r} could not be read ({first_line(error)}): copy or download them again.") from error


def apply_overrides(config: Any, kwargs: dict[str, Any]) -> None:
    """Take settings of the config out of `kwargs`; raises MismatchError when one contradicts what the weights were trained with."""
    for key in [key for key in kwargs if key in type(config).__annotations__]:
        value, saved = kwargs.pop(key), getattr(config, key)
        trained = config.chunk_sizes if key == "chunk_size" and config.chunk_sizes else (saved,)
        if key in BOUND and value not in trained:
            raise MismatchError(f"This model was made with {key} {' or '.join(map(str, trained))}, {value} was asked for: leave {key} out, or train a model with it.")
        setattr(config, key, value)


def check_loaded(name: str, info: Mapping[str, Any]) -> None:
    """Raises MismatchError, naming the part, when weights are missing, superfluous or of another shape (transformers only warns)."""
    for key, saved, wanted in sorted(map(tuple, info["mismatched_keys"])):
        raise MismatchError(
            f"The {_part(key)} in {name!r} does not fit config.json: {key} has shape {tuple(saved)}, the config asks for "
            f"{tuple(wanted)}: use weights and config of one and the same model."
        )
    for what, keys in (("lacks", info["missing_keys"]), ("has unknown weights", info["unexpected_keys"])):
        for key in sorted(keys):
            raise MismatchError(f"The {_part(key)} in {name!r} does not fit config.json: it {what} {key}: use weights and config of one and the same model.")


def check_decoder(config: Any, decoder: Any, name: str) -> None:
    """Raises MismatchError when the decoder named by an adapter is not shaped like the one the adapter was trained with."""
    for key in ("model_type", "hidden_size", "vocab_size", "num_hidden_layers"):
        given, wanted = getattr(decoder.config, key, None), getattr(config.decoder_config, key, None)
        if given != wanted:
            raise MismatchError(f"The adapter was trained with a decoder of {key} {wanted}, {name!r} has {given}: pass decoder_name with the right model.")


def check_tokenizers(model: Any) -> None:
    """Raises MismatchError when a tokenizer can give ids that its network has no embedding for."""
    for part, tokenizer in (("decoder", model.tokenizer), ("encoder", model.encoder_tokenizer)):
        rows = getattr(model, part).get_input_embeddings().num_embeddings
        if tokenizer is not None and len(tokenizer) > rows:
            raise MismatchError(f"The {part}'s tokenizer has {len(tokenizer)} entries, its embeddings {rows}: use the tokenizer that belongs to the {part}.")


def load_tokenizer(name: str, subfolder: str = "", **download: Any) -> Any:
    """The tokenizer in a folder, or None when there is none."""
    subfolder = "/".join(filter(None, (download.pop("subfolder", ""), subfolder)))
    try:
        if not cached_file(name, "tokenizer_config.json", subfolder=subfolder, _raise_exceptions_for_missing_entries=False, **download):
            return None
        return AutoTokenizer.from_pretrained(name, subfolder=subfolder, **download)
    except (OSError, ValueError) as error:
        logger.warning("The tokenizer in %s could not be read: %s", name, first_line(error))
        return None


def quantize_decoder_only(kwargs: dict[str, Any]) -> None:
    """Let a `quantization_config` among `kwargs` spare all but the decoder's layers.

    An index's vectors belong to the encoder's own weights, and projector and policy compute in the type of theirs. The
    decoder's output layer is spared too, as transformers does where nothing is said. The config given is not changed.
    """
    config = kwargs.get("quantization_config")
    if config is None:
        return
    config = AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else copy.deepcopy(config)
    for key in ("modules_to_not_convert", "llm_int8_skip_modules"):
        if hasattr(config, key):
            setattr(config, key, [*(getattr(config, key) or OUTPUT_LAYERS), "encoder", "projector", "policy"])
    kwargs["quantization_config"] = config


def load_adapter(model_class: Any, name: str, config: Any, **kwargs: Any) -> Any:
    """A model from an adapter folder: the decoder from `config.decoder_name`, everything else from the folder.

    `kwargs` go to the decoder's `from_pretrained`. Raises MismatchError when the parts do not fit.
    """
    download = {key: kwargs.pop(key) for key in DOWNLOAD_KWARGS if key in kwargs}
    access = {key: value for key, value in download.items() if key not in ("revision", "subfolder")}
    path = cached_file(name, ADAPTER_FILE, _raise_exceptions_for_missing_entries=False, **download)
    if path is None:
        raise NotFoundError(f"The adapter {name!r} has no {ADAPTER_FILE}: save it again with parts='adapter'.")
    try:
        decoder = AutoModelForCausalLM.from_pretrained(config.decoder_name, revision=config.decoder_revision, **access, **kwargs)
    except OSError as error:
        raise NotFoundError(
            f"The adapter's decoder {config.decoder_name!r} was not found ({first_line(error)}): pass decoder_name with its folder."
        ) from error
    check_decoder(config, decoder, config.decoder_name)
    with readable_weights(name):
        weights = load_file(path)
    model = model_class(config, decoder=decoder)
    state = {key: value for key, value in model.state_dict().items() if is_adapter_key(key)}
    shapes = [(key, weights[key].shape, state[key].shape) for key in weights if key in state and weights[key].shape != state[key].shape]
    check_loaded(name, {"mismatched_keys": shapes, "missing_keys": state.keys() - weights.keys(), "unexpected_keys": weights.keys() - state.keys()})
    model.load_state_dict(weights, strict=False)
    for key, parameter in model.named_parameters():
        if is_adapter_key(key):  # parameters only: rotary buffers stay in float32, as transformers keeps them
            parameter.data = parameter.data.to(decoder.dtype)
    for part in filter(None, (model.encoder, model.projector, model.policy)):
        part.to(decoder.device)
    return model.eval()


def is_adapter_key(key: str) -> bool:
    """Whether a key of the state dict belongs to the adapter: all but the decoder's own weights."""
    return not key.startswith("decoder.") or ".lora_" in key or ".modules_to_save." in key


def _part(key: str) -> str:
    return key.split(".", 1)[0]


# ── saving ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def written_whole(folder: str | os.PathLike) -> Generator[Path]:
    """A new folder beside `folder` to write into; its files are moved there when all are written, readable by others.

    A full disk or an interruption leaves `folder` as it was. Raises InputError when the files cannot be written.
    """
    folder = Path(folder)
    if folder.is_file():
        raise InputError(f"A model is saved into a folder, {folder} is a file: choose another name.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            yield Path(temporary)
            _move_into(Path(temporary), folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"The model could not be written to {folder} ({first_line(error)}): free some space, or choose another folder.") from error


def _move_into(source: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for old in [*folder.glob("model*.safetensors*"), folder / ADAPTER_FILE]:  # else other shards would stay beside the new ones
        if not (source / old.name).exists():
            old.unlink(missing_ok=True)
    for path in sorted(source.rglob("*")):
        target = folder / path.relative_to(source)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            path.chmod(0o644)  # safetensors writes files that only their owner can read
            shutil.move(path, target)


def save_adapter(model: Any, folder: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write config.json and adapter.safetensors. Raises InputError when nobody could find the decoder again."""
    if not model.config.decoder_name:
        raise InputError("An adapter needs its decoder's name, this model was built from a module: set model.config.decoder_name to a folder or hub name.")
    config = copy.deepcopy(model.config)
    config.parts = "adapter"
    config.save_pretrained(folder)
    state = {key: value.detach().cpu().contiguous() for key, value in (state_dict or model.state_dict()).items() if is_adapter_key(key)}
    save_file(state, folder / ADAPTER_FILE, metadata={"format": "pt"})


def save_tokenizers(model: Any, folder: Path) -> None:
    """Write the decoder's tokenizer into the folder, the encoder's into its sub-folder."""
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    if model.encoder_tokenizer is not None:
        model.encoder_tokenizer.save_pretrained(folder / ENCODER_TOKENIZER)


def export_decoder(model: Any, folder: str | os.PathLike) -> None:
    """Write the decoder alone, LoRA merged, as a plain Hugging Face folder that any engine loads.

    Raises InputError, by `check_export_folder`, when the folder is not for that.
    """
    check_export_folder(folder)
    config = copy.deepcopy(model.decoder.config)
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config, dtype=model.decoder.dtype)
    if model.decoder.generation_config is not None:
        shell.generation_config = model.decoder.generation_config
    with written_whole(folder) as new:
        shell.save_pretrained(new, state_dict=merged_state(model.decoder))
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(new)
        (new / EXPORT_MARK).write_text(json.dumps({"written_by": f"refrag {__version__}"}) + "\n", encoding="utf-8")


def check_export_folder(folder: str | os.PathLike) -> None:
    """Raises InputError when a folder holds files and no earlier export: they would be mixed with the decoder's."""
    folder = Path(folder)
    if folder.is_dir() and not (folder / EXPORT_MARK).exists() and any(folder.iterdir()):
        raise InputError(f"A decoder is exported into a folder of its own, {folder} holds other files: choose a new --output-dir.")


def merged_state(decoder: Any) -> dict[str, Tensor]:
    """The decoder's state dict with LoRA merged into copies of the layers it adapts, under the plain names."""
    adapted = {name: module for name, module in decoder.named_modules() if hasattr(module, "get_base_layer")}
    if not adapted:
        return decoder.state_dict()
    state = {key: value for key, value in decoder.state_dict().items() if not any(key.startswith(f"{name}.") for name in adapted)}
    for name, module in adapted.items():
        merged = copy.deepcopy(module)
        merged.merge(safe_merge=True)
        state |= {f"{name}.{key}": value.detach() for key, value in merged.get_base_layer().state_dict().items()}
    return state


# ── LoRA ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def lora_settings(lora: Any) -> dict[str, Any]:
    """What distinguishes a peft.LoraConfig from the default one, as JSON: what RefragConfig.lora holds.

    Raises InputError for another kind of adapter.
    """
    peft = import_peft()
    if not isinstance(lora, peft.LoraConfig):
        raise InputError(f"The decoder's adapter must be a peft.LoraConfig, was a {type(lora).__name__}: use LoRA.")
    default = peft.LoraConfig().to_dict()
    skipped = {"base_model_name_or_path", "peft_version", "auto_mapping", "inference_mode", "revision"}
    given = {key: value for key, value in lora.to_dict().items() if key not in skipped and value != default.get(key)}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in given.items()}


def import_peft() -> Any:
    """The peft module. Raises MissingExtraError when it is not installed."""
    try:
        import peft  # takes seconds
    except ImportError as error:
        raise missing_extra("peft", "lora", "LoRA") from error
    return peft


# ── the hub ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_parts(model: Any) -> None:
    """Raises InputError for a decoder whose tokens see those behind them, such as a BERT in its place, and as `check_tokenizers` does."""
    config = model.decoder.config
    is_causal = config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or any(getattr(config, name, False) for name in ("is_decoder", "causal"))
    if not is_causal or getattr(config, "is_encoder_decoder", False):
        name = model.config.decoder_name or type(model.decoder).__name__
        raise InputError(f"The decoder must be a causal language model, {name!r} is a {config.model_type} model whose tokens see those behind them: the order is from_parts(encoder, decoder).")
    check_tokenizers(model)


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a hub name stood at when it was loaded; the revision itself for a local folder."""
    try:
        path = cached_file(name, "config.json", revision=revision or "main", _raise_exceptions_for_missing_entries=False) or ""
    except OSError:  # offline, or a name that is no repository
        path = ""
    commit = re.search(r"snapshots/([0-9a-f]{40})/", path)
    return commit[1] if commit else revision


def model_card(model: Any, *, license: str | None = None) -> str:
    """README.md of a pushed model: front matter for the hub, what it is, how to load it."""
    config = model.config
    bases = [name for name in (config.decoder_name, config.encoder_name) if name and not Path(name).exists()]
    lines = ["---", "library_name: refrag", "pipeline_tag: text-generation", "tags: [refrag, rag, arxiv:2509.01092]"]
    lines += [f"license: {license}"] if license else []
    lines += [f"base_model: [{', '.join(bases)}]"] if bases else []
    lines += ["---", "", "# A REFRAG model", ""]
    lines += [
        "Retrieved passages enter the decoder as one vector per chunk; a policy expands the chunks that matter "
        "(REFRAG, arXiv 2509.01092).",
        "",
        "| part | what |",
        "|---|---|",
        f"| decoder | {config.decoder_name or config.decoder_config.model_type}{f' @ {config.decoder_revision}' if config.decoder_revision else ''} |",
        f"| encoder | {config.encoder_name or config.encoder_config.model_type}, {config.pooling} pooling |",
        f"| chunk_size | {' or '.join(map(str, config.chunk_sizes or [config.chunk_size]))} tokens |",
        f"| policy | {config.policy['kind']}, {'trained' if config.policy['trained'] else 'not trained'} |",
        f"| LoRA | {'yes' if config.lora else 'no'} |",
        "",
        "```python",
        "from refrag import Refrag",
        "",
        'engine = Refrag.from_pretrained("REPOSITORY")',
        'print(engine.answer("…", passages=["…"]).text)',
        "```",
        "",
    ]
    return "\n".join(lines)


def push(model: Any, repo_id: str, *, parts: str, license: str | None = None, **kwargs: Any) -> str:
    """Upload the model's folder with its card, to a branch that is made if needed; returns the address.

    Raises BackendError when the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=kwargs.pop("token", None))
    private, branch, commit = kwargs.pop("private", None), kwargs.get("revision"), kwargs.pop("commit_message", "Upload refrag model")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        model.save_pretrained(folder, parts=parts)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if branch and not branch.startswith("refs/"):
                api.create_branch(repo_id, branch=branch, exist_ok=True)
            (folder / "README.md").write_text(model_card(model, license=license).replace("REPOSITORY", repo_id), encoding="utf-8")
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit, **kwargs))
        except Exception as error:  # the hub's client raises errors of several libraries
            raise BackendError(
                f"The model could not be uploaded to {repo_id!r} ({first_line(error)}): log in with  hf auth login  or pass token=…, and check the name and the network."
            ) from error
