"""REFRAG as a model of lm-evaluation-harness: the passages in a task's document are compressed, its text is the question.

    lm = RefragLM(Refrag.from_pretrained("bundled"), policy="similarity")
    simple_evaluate(model=lm, tasks=["my_task"], task_manager=TaskManager(include_path="folder"))

A document's passages are read from the fields that refrag.data.formats knows (`passages`, HotpotQA's `context`, …). What
doc_to_text makes goes where the question stands in the prompt template, so it need not repeat passages or template.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..config import Budget, GenerationSettings
from ..data.formats import in_our_fields
from ..engine import Refrag, Request
from ..engine.engine import Stopwatch
from ..errors import InputError, missing_extra
from ..text import Prompt
from .likelihood import token_nll
from .metrics import scored_text

try:
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise missing_extra("lm-eval", "lm-eval", "The evaluation harness") from error


class RefragLM(LM):
    """Answers and log-likelihoods of an engine, for `lm_eval.simple_evaluate`."""

    def __init__(
        self,
        engine: Refrag,
        *,
        policy: str | None = None,
        budget: Budget | None = None,
        max_passages: int | None = None,
        max_new_tokens: int = 64,
        batch_size: int = 8,
    ) -> None:
        """`policy` and `budget` as in a Request; `max_passages`: only a document's first so many; `max_new_tokens` where a task sets none."""
        super().__init__()
        self.engine, self.batch_size, self.max_passages, self.max_new_tokens = engine, batch_size, max_passages, max_new_tokens
        self.how: dict[str, Any] = {"policy": policy, "budget": budget or Budget()}
        self._device = engine.device

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Per request (log-likelihood in nats of its continuation, whether greedy decoding would give it)."""
        found = []
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            for instance, row in zip(batch, self._score(batch), strict=True):
                found.append(row)
                self.cache_hook.add_partial("loglikelihood", instance.args, row)
        return found

    def _score(self, batch: Sequence[Any]) -> list[tuple[float, bool]]:
        pairs = [self._prompt(*instance.args, instance.doc) for instance in batch]
        vectors = self.engine.vectors.chunk_embeds([prompt for prompt, _, _ in pairs], needed=[not all(mask) for _, mask, _ in pairs])
        rows = token_nll(self.engine.model, *map(list, zip(*pairs, strict=True)), torch.cat(vectors))  # type: ignore[call-arg]
        return [(-float(nll.double().sum()), bool(greedy.all())) for nll, greedy in rows]

    def _prompt(self, context: str, continuation: str, doc: Any) -> tuple[Prompt, list[bool], list[int]]:
        """The prompt, what is expanded, and the token ids of the continuation."""
        templated = bool(self.engine.model.tokenizer.chat_template)
        completion = self.engine.builder.encode(continuation.lstrip() if templated else continuation)
        if not completion:
            raise InputError(f"A continuation must have a token or more, was {continuation!r}: check the task's doc_to_target and doc_to_choice.")
        if not context.strip():  # harness convention: the start token alone
            return Prompt(((self._start_token,),), ()), [], completion
        request = self._request(context, doc, GenerationSettings(max_new_tokens=len(completion)))
        with torch.inference_mode():
            row = self.engine._prepare([request], Stopwatch(self.engine.device))[0][0]
        return row.prompt, row.expand_mask.tolist(), completion

    def _request(self, context: str, doc: Any, generation: GenerationSettings) -> Request:
        passages = in_our_fields(doc).get("passages") if isinstance(doc, dict) else None
        return Request(context, list(passages or ())[: self.max_passages], generation=generation, **self.how)

    @property
    def _start_token(self) -> int:
        tokenizer = self.engine.model.tokenizer
        return next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), 0)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Per request the log-likelihood in nats of its whole text, by the decoder alone; long texts in windows."""
        limit = getattr(self.engine.model.decoder.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        return [self._rolling(*instance.args, limit=limit) for instance in requests]

    def _rolling(self, text: str, *, limit: int) -> float:
        ids = self.engine.builder.encode(text)
        total = 0.0
        for window in get_rolling_token_windows(ids, self._start_token, limit - 1, 1):
            before, scored = make_disjoint_window(window)
            [(nll, _)] = token_nll(self.engine.model, [Prompt((tuple(before),), ())], [[]], [scored], None)
            total -= float(nll.double().sum())
        return total

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Per request the answer, its citations taken off, up to the first of the task's stop strings."""
        asked = [self._request(context, instance.doc, self._generation(kwargs)) for instance in requests for context, kwargs in [instance.args]]
        texts: dict[int, str] = {}
        for settings in dict.fromkeys(request.generation for request in asked):
            alike = [place for place, request in enumerate(asked) if request.generation == settings]
            for start in range(0, len(alike), self.batch_size):
                batch = alike[start : start + self.batch_size]
                answers = self.engine.answer_batch([replace(asked[place]) for place in batch])
                texts |= {place: scored_text(answer.text) for place, answer in zip(batch, answers, strict=True)}
        for place, instance in enumerate(requests):
            self.cache_hook.add_partial("generate_until", instance.args, texts[place])
        return [texts[place] for place in range(len(asked))]

    def _generation(self, kwargs: dict[str, Any]) -> GenerationSettings:
        """The task's generation_kwargs in our names."""
        until = kwargs.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(text for text in until if text)
        longest = kwargs.get("max_gen_toks") or kwargs.get("max_new_tokens") or self.max_new_tokens
        temperature = float(kwargs.get("temperature") or 0.0) if kwargs.get("do_sample") else 0.0
        return GenerationSettings(max_new_tokens=int(longest), stop=stop, temperature=temperature)
