"""An optional second look at the passages found: a cross-encoder, or any callable that scores them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import InputError, NotFoundError
from ..index.retrieve import is_on_hub
from ..text import Passage

CANDIDATES = 4
"""With a reranker this many times `top_k` passages are retrieved."""

Reranker = Callable[[str, Sequence[Passage]], Sequence[float]]
"""(question, passages) → one score per passage, higher is better."""


class CrossEncoder:
    """A Hugging Face sequence classifier with one output that reads question and passage together."""

    def __init__(self, name: str, *, device: torch.device) -> None:
        """Raises NotFoundError when there is no such model, InputError when it has several outputs."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        loading = {"local_files_only": not is_on_hub(name)}  # else an unknown name is looked for again and again
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name, **loading)
            self.model = AutoModelForSequenceClassification.from_pretrained(name, **loading).to(device).eval()
        except (OSError, ValueError) as error:
            raise NotFoundError(f"There is no reranker {name!r} on this machine or the hub: check --reranker.") from error
        if self.model.config.num_labels != 1:
            raise InputError(f"A reranker must have one output, {name!r} has {self.model.config.num_labels}: choose a cross-encoder.")

    @torch.inference_mode()
    def __call__(self, question: str, passages: Sequence[Passage]) -> list[float]:
        """One logit per passage; passages longer than the window are cut."""
        texts = [f"{passage.title}\n{passage.text}" if passage.title else passage.text for passage in passages]
        inputs = self.tokenizer([question] * len(texts), texts, padding=True, truncation="only_second", return_tensors="pt")
        return self.model(**inputs.to(self.model.device)).logits.squeeze(-1).float().tolist()


def rerank(reranker: Reranker, question: str, passages: Sequence[Passage], top_k: int) -> list[tuple[Passage, float]]:
    """The best `top_k` passages with their new scores; equal ones keep their order."""
    given = reranker(question, passages) if passages else []
    try:
        scores = [float(score) for score in given]
    except (TypeError, ValueError) as error:
        raise InputError(f"A reranker must give one number per passage ({len(passages)}), gave a {type(given).__name__} ({error}).") from error
    if len(scores) != len(passages) or any(math.isnan(score) for score in scores):
        raise InputError(f"A reranker must give one number per passage ({len(passages)}), gave {scores[:5]}{'…' * (len(scores) > 5)}.")
    ranked = sorted(zip(passages, scores, strict=True), key=lambda pair: -pair[1])
    return ranked[:top_k]
