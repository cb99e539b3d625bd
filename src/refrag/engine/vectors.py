"""Where the chunk vectors of a prompt come from: the index, else a cache by content, else the encoder."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..text import Passage, Prompt


class VectorCache:
    """The chunk vectors of the passages used last, by the hash of their text; safe to share between threads."""

    def __init__(self, max_chunks: int) -> None:
        self.max_chunks = max_chunks
        self.num_chunks = 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Float[Tensor, "chunk enc"] | None:
        """The vectors of a text, or None."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: bytes, vectors: Float[Tensor, "chunk enc"]) -> None:
        """Keep the vectors of a text; those used longest ago are dropped when there are too many."""
        with self._lock:
            self.num_chunks += len(vectors) - len(self._kept.pop(key, ()))
            self._kept[key] = vectors
            while self.num_chunks > self.max_chunks:
                self.num_chunks -= len(self._kept.popitem(last=False)[1])


class VectorSource:
    """Chunk vectors for prompts of one model."""

    def __init__(self, model: Any, *, index: Any = None, cache_chunks: int) -> None:
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        self.index = index
        self.cache = VectorCache(cache_chunks)
        self.counts = {"index": 0, "cache": 0, "encoder": 0}
        """Chunk vectors used so far, by where they came from."""

    def chunk_embeds(self, prompts: Sequence[Prompt], *, needed: Sequence[bool]) -> list[Float[Tensor, "_ enc"]]:
        """The vectors of each prompt's chunks, on the model's device; missing ones are encoded together.

        The index's vectors serve a passage whose id is there with exactly this text, wherever the passage came from.
        Prompts that need no vectors, since every chunk is expanded, get zeros.
        """
        wanted = [prompt for prompt, is_needed in zip(prompts, needed, strict=True) if is_needed]
        places = [(prompt, number, texts) for prompt in wanted for number, texts in _texts_by_passage(prompt).items()]
        passages = [prompt.passages[number] for prompt, number, _ in places]
        stored = self._read(passages)
        found: dict[bytes, Tensor] = {}
        missing: dict[bytes, list[str]] = {}
        keys = [blake2b(passage.text.encode(), digest_size=16).digest() for passage in passages]
        for key, passage, (_, _, texts) in zip(keys, passages, places, strict=True):
            source = "index"
            text, vectors = stored.get(passage.id, ("", None))
            if vectors is None or text != passage.text or len(vectors) != len(texts):
                source, vectors = "cache", self.cache.get(key)
            if vectors is None:
                source, missing[key] = "encoder", texts
            else:
                found[key] = vectors
            self.counts[source] += len(texts)
        found |= self._encode(missing)
        parts: dict[int, list[Tensor]] = {id(prompt): [] for prompt in wanted}
        for key, (prompt, _, _) in zip(keys, places, strict=True):
            parts[id(prompt)].append(found[key].float())
        return [self._table(prompt, parts.get(id(prompt))) for prompt in prompts]

    def _table(self, prompt: Prompt, parts: list[Tensor] | None) -> Float[Tensor, "chunk enc"]:
        width = self.model.encoder.config.hidden_size
        return torch.cat(parts).to(self.device) if parts else torch.zeros(len(prompt.chunks), width, device=self.device)

    def _read(self, passages: Sequence[Passage]) -> dict[str, tuple[str, Tensor]]:
        """By id what the index holds of these passages: text and vectors, from one read, so that they belong together."""
        if self.index is None or not passages:
            return {}
        return self.index.stored(list(dict.fromkeys(passage.id for passage in passages)))

    def _encode(self, missing: dict[bytes, list[str]]) -> dict[bytes, Tensor]:
        if not missing:
            return {}
        vectors = self.model.encode([text for texts in missing.values() for text in texts]).cpu()
        encoded = dict(zip(missing, vectors.split([len(texts) for texts in missing.values()]), strict=True))
        for key, own in encoded.items():
            self.cache.put(key, own.clone())  # a slice would keep the whole batch alive
        return encoded


def _texts_by_passage(prompt: Prompt) -> dict[int, list[str]]:
    """Chunk texts of each passage that has chunks, by its place in the prompt."""
    texts: dict[int, list[str]] = {}
    for chunk, text in zip(prompt.chunks, prompt.chunk_texts(), strict=True):
        texts.setdefault(chunk.passage, []).append(text)
    return texts
