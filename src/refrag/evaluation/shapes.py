"""Models of real sizes with random weights, and text to read: values do not change speed, shapes do."""

import random
from itertools import chain, islice
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, RobertaConfig

from ..model import RefragModel
from .settings import DecoderShape, EncoderShape

LLAMA_3 = {"vocab_size": 128256, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rms_norm_eps": 1e-5}
DECODERS: dict[str, dict] = {
    "tiny": {
        "vocab_size": 8192, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    },
    "llama-3.2-1b": LLAMA_3 | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "llama-3.2-3b": LLAMA_3 | {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "llama-2-7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
    },
}  # fmt: skip
"""Sizes of the published models. All get 131,072 positions (Llama 2 has 4,096): rotary tables do not change speed."""

ROBERTA_BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
ENCODERS: dict[str, dict] = {
    "tiny": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2},
    "roberta-base-shallow": ROBERTA_BASE | {"num_hidden_layers": 2},
    "roberta-base": ROBERTA_BASE | {"num_hidden_layers": 12},
    "roberta-large": {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 24},
}

BLOCK = 1 << 22
"""Random numbers drawn; all weights are copies of this block (drawing a billion takes longer than the measurement)."""


def decoder_config(shape: DecoderShape) -> LlamaConfig:
    """The configuration of a decoder of that size."""
    return LlamaConfig(**DECODERS[shape], max_position_embeddings=131072, bos_token_id=0, eos_token_id=1, pad_token_id=2)


def encoder_config(shape: EncoderShape) -> RobertaConfig:
    """The configuration of an encoder of that size."""
    vocabulary = {"vocab_size": 8192 if shape == "tiny" else 50265, "type_vocab_size": 1, "max_position_embeddings": 514}
    return RobertaConfig(**ENCODERS[shape], **vocabulary, bos_token_id=0, eos_token_id=1, pad_token_id=2)


def random_refrag(
    decoder: DecoderShape, encoder: EncoderShape, *, chunk_size: int, question_aware: bool = True, dtype: torch.dtype, device: torch.device, seed: int
) -> RefragModel:
    """A RefragModel of real sizes with random weights, an untrained transformer policy, and tokenizers of its own, in eval mode."""
    torch.manual_seed(seed)
    words = vocabulary(seed)
    model = RefragModel.from_parts(
        fill_randomly(AutoModel, encoder_config(encoder), dtype=dtype, device=device),
        fill_randomly(AutoModelForCausalLM, decoder_config(decoder), dtype=dtype, device=device),
        encoder_tokenizer=word_tokenizer(words, ends=True),
        decoder_tokenizer=word_tokenizer(words),
        chunk_size=chunk_size,
        policy={"trained": True, "question_aware": question_aware},  # random like all the rest, but the engine may use it
    )
    return model.to(device=device, dtype=dtype).eval()


@torch.no_grad()
def fill_randomly(auto_class: Any, config: LlamaConfig | RobertaConfig, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model of a configuration with random matrices (std 0.02), norms of one and biases of zero, in seconds.

    `auto_class`: the transformers Auto class that builds it.
    """
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=dtype)
    model.to_empty(device=device)
    model.tie_weights()  # to_empty parts tied weights
    for module in model.modules():
        if next(module.buffers(recurse=False), None) is not None:
            model._init_weights(module)  # rotary frequencies and position ids: not random, and not saved
    block = torch.randn(BLOCK, device=device).mul_(0.02).to(dtype)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            for piece in parameter.view(-1).split(BLOCK):
                piece.copy_(block[: piece.numel()])
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        parameter._is_hf_initialized = True  # a composite model would draw them again
    return model


def vocabulary(seed: int, *, size: int = 1000) -> list[str]:
    """Pronounceable invented words, each once, in a seeded order."""
    rng = random.Random(seed)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    invented = ("".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in iter(int, 1))
    return list(islice(dict.fromkeys(islice(invented, 4 * size)), size))


def word_tokenizer(words: list[str], *, ends: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which each of the words is one token; `ends`: texts get <s> and </s>, as RoBERTa's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(chain(words, (" " + word for word in words)), trainer)
    if ends:
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512 if ends else 131072)
