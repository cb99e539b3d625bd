"""Fixtures that every test file shares: tokenizers trained on the spot and tiny random networks, no network needed."""

import logging
import os
import signal
import tempfile

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="refrag-datasets-"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background may have inherited that it is ignored
torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS", "2"))))

DECODERS = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gpt_neox")
ENCODERS = ("roberta", "bert")

SENTENCES = [
    "The harbour of Velmoor was founded in 1742 by the shipwright Anna Torrel.",
    "Question: Who founded the harbour of Velmoor?\nAnswer: Anna Torrel",
    "[1] Velmoor\nThe town lies on the northern coast, and 3,412 people live there.",
    "Größe, naïve, Ελλάδα, Москва, 東京, مرحبا, 😀",
    "A lighthouse was built beside the old mill; its lamp burned for ninety years.",
]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def train_tokenizer(*, control_tokens: tuple[str, ...] = (), vocab_size: int = 400, **kwargs) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with <pad>, <s> and </s> as ids 0 to 2, which puts <s> before every text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>", *control_tokens]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    extra = {"additional_special_tokens": list(control_tokens)} if control_tokens else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **extra, **kwargs)


def train_encoder_tokenizer() -> PreTrainedTokenizerFast:
    """A RoBERTa-like tokenizer: <s> text </s>, <pad> is id 1 as in RoBERTa, 60 tokens at most."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<s>", "<pad>", "</s>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=60, **tokens)


def build_decoder(kind: str, *, vocab_size: int = 400, seed: int = 0, **overrides) -> PreTrainedModel:
    """A two-layer random decoder of one of DECODERS in fp32, in eval mode."""
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind != "gpt_neox":
        shape["num_key_value_heads"] = 2
    if kind in ("qwen3", "gemma"):
        shape["head_dim"] = 8
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(shape | overrides))).float().eval()


def build_encoder(kind: str, *, vocab_size: int = 320, seed: int = 1, **overrides) -> PreTrainedModel:
    """A two-layer random encoder of one of ENCODERS in fp32, in eval mode, hidden width 24."""
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
        "type_vocab_size": 1,
    }
    torch.manual_seed(seed)
    return AutoModel.from_config(AutoConfig.for_model(kind, **(shape | overrides))).float().eval()


def build_model(decoder_kind: str = "llama", encoder_kind: str = "roberta", *, chunk_size: int = 4, **kwargs):
    """A whole tiny RefragModel in eval mode with both tokenizers."""
    from refrag.model import RefragModel

    torch.manual_seed(2)
    parts = {"encoder_tokenizer": train_encoder_tokenizer(), "decoder_tokenizer": train_tokenizer()} | kwargs
    return RefragModel.from_parts(build_encoder(encoder_kind), build_decoder(decoder_kind), chunk_size=chunk_size, **parts).eval()


@pytest.fixture(autouse=True)
def _log_level():
    """Commands run in tests and fixtures set the level of messages: every test starts with the usual one."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("refrag").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, 400 entries, bos/eos/pad, no chat template."""
    return train_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The same with a Llama-3-like chat template and its control tokens."""
    control = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return train_tokenizer(control_tokens=control, vocab_size=403, chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """RoBERTa-like, 320 entries."""
    return train_encoder_tokenizer()


@pytest.fixture(scope="session")
def make_decoder() -> Callable[..., PreTrainedModel]:
    """make_decoder(kind, **config): a new tiny decoder."""
    return build_decoder


@pytest.fixture(scope="session")
def make_encoder() -> Callable[..., PreTrainedModel]:
    """make_encoder(kind, **config): a new tiny encoder."""
    return build_encoder


@pytest.fixture(scope="session")
def make_model():
    """make_model(decoder_kind, encoder_kind, chunk_size=4, **from_parts): a new tiny RefragModel."""
    return build_model


@pytest.fixture(scope="session")
def tiny_model():
    """A RefragModel (Llama decoder, RoBERTa encoder, chunk_size 4) shared by the whole session: do not change it."""
    return build_model()


@pytest.fixture(scope="session")
def prompts(tokenizer):
    """Two prompts for `tiny_model` and its like: two passages, and one."""
    from refrag.text import Passage, PromptBuilder

    harbour = Passage("a", "The harbour of Velmoor was founded in 1742 by the shipwright Anna Torrel.", "Velmoor")
    lamp = Passage("b", "Its lamp burned for ninety years.")
    builder = PromptBuilder(tokenizer, chunk_size=4)
    return [builder.build("Who founded the harbour?", [harbour, lamp]), builder.build("How long did the lamp burn?", [lamp])]


def mixed_mask(prompt) -> list[bool]:
    """Every third chunk expanded."""
    return [chunk.index % 3 == 0 for chunk in prompt.chunks]


def vectors_of(model, prompts) -> torch.Tensor:
    """The chunk vectors of a batch of prompts."""
    return model.encode([text for prompt in prompts for text in prompt.chunk_texts()])


@torch.no_grad()
def logits_of(model, prompts, masks, **kwargs):
    """(layout, logits) of a batch."""
    from refrag.layout import lay_out

    layout = lay_out(prompts, masks, **kwargs)
    return layout, model(layout=layout, chunk_embeds=vectors_of(model, prompts)).logits


def assert_same(one, other, prompts) -> None:
    """Two models give the same logits, bit for bit, over mixed inputs."""
    masks = [mixed_mask(prompt) for prompt in prompts]
    assert torch.equal(logits_of(one, prompts, masks)[1], logits_of(other, prompts, masks)[1])


@pytest.fixture(scope="session")
def almanac(tmp_path_factory):
    """(engine, cases): the bundled model over an index of three held-out almanac cases, 24 passages, and the cases."""
    from refrag.config import resolve_model
    from refrag.demo.almanac import evaluation_cases
    from refrag.engine import Refrag
    from refrag.errors import NotFoundError
    from refrag.index import PassageIndex
    from refrag.model import load_model

    try:
        resolve_model("bundled")
    except NotFoundError:
        pytest.skip("no bundled weights in this installation")
    model = load_model("bundled", device="cpu")
    cases = list(evaluation_cases(3))
    index = PassageIndex.create(tmp_path_factory.mktemp("almanac") / "index", model)
    index.add([passage for case, _ in cases for passage in case.passages])
    return Refrag(model, index=index), cases
