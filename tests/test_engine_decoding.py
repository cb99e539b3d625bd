"""Decoding by itself: text out of token ids, and sampling by noise, against plain Hugging Face where there is an oracle."""

from pathlib import Path

import pytest
import torch
from conftest import DECODERS, build_decoder
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from refrag.config import GenerationSettings
from refrag.engine.decoding import GumbelNoise, TextFeed, decode, end_token_ids
from refrag.layout import MixedInputs

EOS = 2


def feed_of(tokenizer, *stop: str) -> tuple[TextFeed, list[str]]:
    pieces: list[str] = []
    return TextFeed(tokenizer, frozenset([EOS]), stop, pieces.append), pieces


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def mixed(embeds: torch.Tensor, mask: torch.Tensor | None = None) -> MixedInputs:
    mask = torch.ones(embeds.shape[:2], dtype=torch.long) if mask is None else mask
    return MixedInputs(embeds, mask, (mask.cumsum(1) - 1).clamp(min=0), torch.full_like(mask, -100))


@pytest.mark.parametrize("text", ["Anna Torrel", "東京 and مرحبا, 😀", "  one\n two  ", "a", "naïve\n\n\nGröße"])
def test_pieces_are_the_text(tokenizer, text: str) -> None:
    feed, pieces = feed_of(tokenizer)
    for token in ids_of(tokenizer, text):
        feed.push(token)
        assert "".join(pieces) == feed.text and "\ufffd" not in feed.text  # a character is shown when it is whole
    feed.push(EOS)
    assert feed.text == "".join(pieces) == text.strip()
    assert feed.finished


@given(ids=st.lists(st.integers(0, 399), max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_tokens_give_what_the_tokenizer_decodes(tokenizer, ids: list[int]) -> None:
    feed, pieces = feed_of(tokenizer)
    for token in ids:
        feed.push(token)
    feed.close()
    kept = ids[: ids.index(EOS)] if EOS in ids else ids
    assert "".join(pieces) == feed.text == tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("Anna Torrel\nQuestion: who", ("\n",), "Anna Torrel"),
        ("Anna Torrel. Question: who", (" Question:",), "Anna Torrel."),
        ("one two three four", ("three", "two"), "one"),  # the first in the text, not in the list
        ("aaab", ("aab",), "a"),
        ("a Quest is no Question", ("Question",), "a Quest is no"),
        ("nothing to stop", ("zzz",), "nothing to stop"),
        ("ends with Quest", ("Question",), "ends with Quest"),  # what was held back is given at the end
    ],
)
def test_stop_strings_over_token_borders(tokenizer, text: str, stop: tuple[str, ...], expected: str) -> None:
    feed, pieces = feed_of(tokenizer, *stop)
    for token in ids_of(tokenizer, text):
        feed.push(token)
    finished = feed.finished
    feed.close()
    assert feed.text == "".join(pieces) == expected
    assert finished == any(word in text for word in stop)


def test_tokens_after_the_end_do_not_count(tokenizer) -> None:
    feed, _ = feed_of(tokenizer)
    for token in [*ids_of(tokenizer, "mill"), EOS, *ids_of(tokenizer, " lamp")]:
        feed.push(token)
    assert feed.text == "mill"
    assert feed.num_tokens == len(ids_of(tokenizer, "mill")) + 1


def test_noise_draws_from_the_softmax() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -float("inf")]])
    noise = GumbelNoise([7])
    draws = torch.cat([noise(torch.zeros(1, 0), logits).argmax(-1) for _ in range(20_000)])
    shares = torch.bincount(draws, minlength=5) / len(draws)
    torch.testing.assert_close(shares, logits.softmax(-1)[0], atol=0.012, rtol=0)
    assert shares[4] == 0  # what top-p or top-k excluded stays excluded


def test_a_row_draws_the_same_alone_and_in_a_batch() -> None:
    logits = torch.randn(1, 50)
    alone = GumbelNoise([5])(torch.zeros(1, 0), logits)
    batch = GumbelNoise([4, 5])(torch.zeros(2, 0), logits.expand(2, -1))
    assert torch.equal(alone[0], batch[1])
    assert not torch.equal(batch[0], batch[1])


@pytest.mark.parametrize("kind", DECODERS)
def test_decoding_equals_generate_on_token_ids(tokenizer, kind: str) -> None:
    decoder = build_decoder(kind)
    ids = torch.tensor([[1, *ids_of(tokenizer, "Who founded the harbour of Velmoor?")]])
    expected = decoder.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    feed, _ = feed_of(tokenizer)
    clock = decode(decoder, mixed(decoder.get_input_embeddings()(ids)), [feed], settings=GenerationSettings(max_new_tokens=12), seeds=[0])
    assert feed.text == tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert feed.num_tokens == len(clock.stamps) == len(expected)


def test_sampling_follows_the_warpers(tokenizer) -> None:
    """top_k = 1 leaves the greedy token, whatever the temperature and the seed."""
    decoder = build_decoder("llama")
    inputs = mixed(decoder.get_input_embeddings()(torch.tensor([[1, 30, 40, 50]])))

    def text(seed: int, **options) -> str:
        feed, _ = feed_of(tokenizer)
        decode(decoder, inputs, [feed], settings=GenerationSettings(max_new_tokens=30, **options), seeds=[seed])
        return feed.text

    greedy = text(0)
    assert text(3, temperature=5.0, top_k=1) == text(4, temperature=5.0, top_p=1e-6) == greedy
    assert text(3, temperature=5.0) == text(3, temperature=5.0)
    assert len({text(seed, temperature=5.0) for seed in range(4)}) > 1
    assert text(0, repetition_penalty=50.0) != greedy  # thirty tokens repeat themselves


def test_the_checkpoints_own_sampling_defaults_do_not_count(tokenizer) -> None:
    decoder = build_decoder("llama")
    inputs = mixed(decoder.get_input_embeddings()(torch.tensor([[1, 30, 40, 50]])))
    texts = []
    for defaults in ({}, {"do_sample": True, "temperature": 3.0, "top_p": 0.9, "repetition_penalty": 5.0, "max_length": 6}):
        decoder.generation_config.update(**defaults)
        feed, _ = feed_of(tokenizer)
        decode(decoder, inputs, [feed], settings=GenerationSettings(max_new_tokens=8), seeds=[0])
        texts.append(feed.text)
        assert feed.num_tokens == 8
    assert texts[0] == texts[1]


def test_every_end_token_ends(tokenizer) -> None:
    decoder = build_decoder("llama")
    decoder.generation_config.eos_token_id = [7, 9]
    assert end_token_ids(decoder, tokenizer) == {2, 7, 9}


STORIES = Path(__file__).parents[2] / "shared" / "weights" / "stories260K-hf"


@pytest.mark.skipif(not STORIES.exists(), reason="needs the shared stories260K checkpoint")
def test_a_trained_llama_with_a_sentencepiece_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    for text in ("Once upon a time, there was a 東京 girl. “Hi”  !\n\nThe end", " a b", "▁"):
        feed, pieces = feed_of(tokenizer)
        for token in ids_of(tokenizer, text):
            feed.push(token)
        feed.close()
        assert feed.text == "".join(pieces) == text.replace("▁", " ").strip()
    decoder = AutoModelForCausalLM.from_pretrained(STORIES).eval()
    ids = tokenizer("Once upon a time, Lily", return_tensors="pt")["input_ids"]
    expected = decoder.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    feed, pieces = feed_of(tokenizer)
    decode(decoder, mixed(decoder.get_input_embeddings()(ids)), [feed], settings=GenerationSettings(max_new_tokens=40), seeds=[0])
    assert feed.text == "".join(pieces) == tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert len(feed.text.split()) > 15
