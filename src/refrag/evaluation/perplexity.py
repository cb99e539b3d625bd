"""Log-perplexity by the paper's protocol: nats a token on the first o tokens after s tokens of context, by how the context is given.

    text: … [ s tokens of context ][ o tokens that are scored ] …
    full: all s tokens · none: the start token alone · truncated: the last s/k tokens · refrag: s/k vectors, nothing expanded
    POLICY@p: floor(p * s/k) chunks as tokens, by each policy · truncated@p: as many of the last tokens as a policy then has slots
"""

import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..config import Budget
from ..data.rows import Document
from ..errors import InputError
from ..model import MAX_LOGITS, RefragModel
from ..policy import PolicyInputs, decide
from ..text import Chunk, Passage, Prompt, PromptBuilder
from .child import is_out_of_memory
from .likelihood import token_nll
from .qa import OUT_OF_MEMORY
from .statistics import mean_interval
from .tasks import RULES, PerplexitySettings, Progress

logger = logging.getLogger(__name__)

POLICIES = (*RULES, "learned")
RESAMPLES = 1000


class Window(NamedTuple):
    """A stretch of a text."""

    context: Prompt
    """The start token and the chunks of the context."""
    output: list[int]
    """Token ids that are scored."""


@dataclass
class Variant:
    """One way to give the context, and what came of it."""

    name: str
    policy: str | None = None
    """None: no chunks, but the last `num_tokens` tokens of the context."""
    expand_fraction: float = 0.0
    num_tokens: int = 0
    problem: str = ""

    def __post_init__(self) -> None:
        self.nll: list[list[float]] = []
        """Per window the mean over the first o tokens, for each o."""
        self.slots = 0


def measure(model: RefragModel, documents: Iterable[Document], settings: PerplexitySettings, *, progress: Progress | None = None) -> dict[str, Any]:
    """The values of a `perplexity` result: windows, and per variant its slots, its nats a token and the share of the benefit kept.

    Works with any RefragModel that has its tokenizers; no index is needed. The model is put into eval mode and back.
    Raises InputError for a context that is no multiple of the chunk size, for texts that are all too short, and for a policy
    that the model does not have.
    """
    chunk_size = model.config.chunk_size
    if settings.context_tokens % chunk_size:
        near = max(settings.context_tokens // chunk_size, 1) * chunk_size
        raise InputError(f"context_tokens must be a multiple of the chunk size, {chunk_size}, was {settings.context_tokens}: try {near}.")
    if model.tokenizer is None or model.encoder_tokenizer is None:
        raise InputError("Perplexity needs the tokenizers of decoder and encoder: set model.tokenizer and model.encoder_tokenizer.")
    found, counts = windows(documents, PromptBuilder(model.tokenizer, chunk_size=chunk_size), model, settings)
    variants = build_variants(model, settings, chunk_size)
    _mark_too_long(variants, found[0], model, settings)
    was_training = model.training
    model.eval()
    try:
        _score_all(model, found, variants, settings, progress)
    finally:
        model.train(was_training)
    return {**counts, "chunk_size": chunk_size, "context_chunks": settings.context_tokens // chunk_size, "variants": report(variants, settings)}


# ── windows ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def windows(documents: Iterable[Document], builder: PromptBuilder, model: RefragModel, settings: PerplexitySettings) -> tuple[list[Window], dict[str, int]]:
    """Windows that do not overlap, at most `limit` of them drawn at random, and what became of the documents."""
    size, needed = builder.chunk_size, settings.context_tokens + max(settings.output_tokens)
    start, places, texts = _start_token(model), [], []
    longest = num_documents = 0
    for document in documents:
        num_documents += 1
        chunked = builder.chunk(document.text)
        longest = max(longest, len(chunked.token_ids))
        step = -(-needed // size) * size  # windows begin where chunks do
        count = 1 + (len(chunked.token_ids) - needed) // step if len(chunked.token_ids) >= needed else 0
        if count:
            texts.append((document, chunked))
            places += [(len(texts) - 1, number * step) for number in range(count)]
    if not places:
        raise InputError(
            f"A window takes {needed} tokens of context and output, the longest of {num_documents} texts has {longest}: "
            "pass longer texts, or lower --context-tokens or --output-tokens."
        )
    chosen = sorted(random.Random(settings.seed).sample(places, min(settings.limit, len(places))))
    found = [_window(*texts[number], begin, start, settings) for number, begin in chosen]
    return found, {"documents": num_documents, "too_short": num_documents - len(texts), "windows": len(found), "windows_there": len(places)}


def _window(document: Document, chunked: Any, begin: int, start: int, settings: PerplexitySettings) -> Window:
    size, ids, end = chunked.chunk_size, chunked.token_ids, begin + settings.context_tokens
    numbers = range(begin // size, end // size)
    chunks = tuple(Chunk(index, 0, *chunked.spans[number], ids[number * size : (number + 1) * size]) for index, number in enumerate(numbers))
    return Window(Prompt(((start,), *chunks), chunks, (Passage(document.id, document.text),)), list(ids[end : end + max(settings.output_tokens)]))


def _start_token(model: RefragModel) -> int:
    """What stands before everything: without it the first token after no context would have nothing to be predicted from."""
    config = model.decoder.config.get_text_config()
    candidates = (model.tokenizer.bos_token_id, config.bos_token_id, model.tokenizer.eos_token_id, config.eos_token_id)
    return next((token for token in candidates if isinstance(token, int)), 0)


# ── variants ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def build_variants(model: RefragModel, settings: PerplexitySettings, chunk_size: int) -> list[Variant]:
    """full, none, truncated, refrag, and each policy beside a truncated context at each expand fraction."""
    num_chunks = settings.context_tokens // chunk_size
    policies = settings.policies or (POLICIES if model.has_trained_policy else RULES)
    for name in policies:
        if name not in POLICIES:
            raise InputError(f"There is no policy {name!r} to compare: choose among {', '.join(POLICIES)}.")
        if name == "learned" and not model.has_trained_policy:
            raise InputError("This model has no trained policy: leave 'learned' out of --policies, or train one.")
    variants = [Variant("full", "all"), Variant("none"), Variant("truncated", num_tokens=num_chunks), Variant("refrag", "none")]
    for fraction in settings.expand_fractions:
        slots = num_chunks + int(fraction * num_chunks + 1e-9) * (chunk_size - 1)
        variants += [*(Variant(f"{name}@{fraction:g}", name, fraction) for name in policies), Variant(f"truncated@{fraction:g}", num_tokens=slots)]
    return variants


def _mark_too_long(variants: Sequence[Variant], window: Window, model: RefragModel, settings: PerplexitySettings) -> None:
    limit = getattr(model.decoder.config.get_text_config(), "max_position_embeddings", None)
    for variant in variants:
        variant.slots = _slots(variant, window)
        if limit is not None and variant.slots + len(window.output) > limit:
            variant.problem = f"{variant.slots} slots and {len(window.output)} output tokens are more than the decoder's {limit} positions"
            logger.warning("%s is left out: %s.", variant.name, variant.problem)


def _slots(variant: Variant, window: Window) -> int:
    """Slots before the output, the start token included."""
    prompt = window.context
    if variant.policy is None:
        return 1 + variant.num_tokens
    size = len(prompt.chunks[0].token_ids)
    expanded = len(prompt.chunks) if variant.policy == "all" else int(variant.expand_fraction * len(prompt.chunks) + 1e-9)
    return 1 + len(prompt.chunks) + expanded * (size - 1)


# ── scoring ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _score_all(model: RefragModel, found: Sequence[Window], variants: Sequence[Variant], settings: PerplexitySettings, progress: Progress | None) -> None:
    vocab, longest = model.get_input_embeddings().num_embeddings, max(settings.output_tokens) + 1
    size = max(1, min(settings.batch_size, MAX_LOGITS // (vocab * longest)))
    for start in range(0, len(found), size):
        batch = found[start : start + size]
        vectors: Tensor | None = None
        for variant in variants:
            if variant.problem:
                continue
            try:
                if variant.policy not in (None, "all") and vectors is None:
                    vectors = model.encode([text for window in batch for text in window.context.chunk_texts()])
                variant.nll += _score(model, batch, vectors, variant, settings, first=start)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                variant.problem = f"{OUT_OF_MEMORY} after {len(variant.nll)} windows"
                logger.warning("%s: %s; lower --batch-size.", variant.name, variant.problem)
        if progress is not None:
            progress("windows", start + len(batch), len(found))


def _score(model: RefragModel, batch: Sequence[Window], vectors: Float[Tensor, "chunk enc"] | None, variant: Variant, settings: PerplexitySettings, *, first: int) -> list[list[float]]:  # fmt: skip
    """Per window the mean nats over its first o tokens, for each o."""
    contexts = [window.context for window in batch]
    outputs = [window.output for window in batch]
    if variant.policy in (None, "all"):
        bare = [_last_tokens(prompt, variant.num_tokens if variant.policy is None else prompt.num_context_tokens) for prompt in contexts]
        rows = token_nll(model, bare, [[]] * len(bare), outputs, None)
    else:
        assert vectors is not None
        own = vectors.split([len(prompt.chunks) for prompt in contexts])
        masks = [_mask(model, prompt, part, variant, seed=settings.seed + first + number) for number, (prompt, part) in enumerate(zip(contexts, own, strict=True))]
        rows = token_nll(model, contexts, masks, outputs, vectors)
    return [[float(nll[:number].double().mean()) for number in settings.output_tokens] for nll, _ in rows]


def _last_tokens(prompt: Prompt, count: int) -> Prompt:
    """The start token and the last tokens of the context, without chunks."""
    start, *ids = prompt.token_ids()
    kept = (start, *ids[len(ids) - count :])
    return Prompt((kept,), ())


def _mask(model: RefragModel, prompt: Prompt, vectors: Float[Tensor, "chunk enc"], variant: Variant, *, seed: int) -> Any:
    """The chunks that are expanded. There is no question here: policies that look at one get the last chunk, after which the output follows."""
    inputs = PolicyInputs(
        chunk_embeds=vectors,
        chunk_lengths=torch.tensor([len(chunk.token_ids) for chunk in prompt.chunks], device=vectors.device),
        passage_index=torch.zeros(len(prompt.chunks), dtype=torch.long, device=vectors.device),
        question_embeds=vectors[-1],
        perplexity=lambda: model.chunk_perplexity(prompt),
        seed=seed,
    )
    budget = Budget() if variant.policy == "all" else Budget(expand_fraction=variant.expand_fraction)
    assert variant.policy is not None
    return decide(variant.policy, inputs, budget=budget, base_slots=0, default_fraction=1.0, learned=model.policy)[0].cpu()


# ── the result ───────────────────────────────────────────────────────────────────────────────────────────────────────


def report(variants: Sequence[Variant], settings: PerplexitySettings) -> dict[str, dict[str, Any]]:
    """Per variant: slots, rate, and for each o the mean nats a token and the share of the context benefit kept, with 95 % intervals.

    kept = (none - x) / (none - full). Windows are resampled together, so the interval of a share is paired.
    """
    table = {variant.name: np.array(variant.nll).reshape(len(variant.nll), len(settings.output_tokens)) for variant in variants}
    found = {}
    for variant in variants:
        values = table[variant.name]
        entry: dict[str, Any] = {"slots": variant.slots, "rate": settings.context_tokens / max(variant.slots - 1, 1), "problem": variant.problem or None, "windows": len(values)}
        if variant.name == "none":
            entry["rate"] = None
        if len(values):
            entry["nats"] = {str(o): _interval(values[:, place], settings.seed) for place, o in enumerate(settings.output_tokens)}
        full, none = table.get("full", values[:0]), table["none"]
        if len(values) and len(values) == len(full) == len(none):
            entry["kept"] = {str(o): _kept(none[:, place], values[:, place], full[:, place], settings.seed) for place, o in enumerate(settings.output_tokens)}
        found[variant.name] = entry
    return found


def _interval(values: np.ndarray, seed: int) -> dict[str, float]:
    mean, low, high = mean_interval(values.tolist(), resamples=RESAMPLES, seed=seed)
    return {"mean": mean, "low": low, "high": high}


def _kept(none: np.ndarray, values: np.ndarray, full: np.ndarray, seed: int) -> dict[str, float | None]:
    """None where the context is of no measurable use: the share then means nothing."""
    benefit = none.mean() - full.mean()
    if benefit <= 1e-9:
        return {"mean": None, "low": None, "high": None}
    rng, count = np.random.default_rng(seed), len(values)
    draws = rng.integers(0, count, (RESAMPLES, count))
    below = (none[draws] - full[draws]).mean(1)
    shares = (none[draws] - values[draws]).mean(1)[below > 0] / below[below > 0]
    low, high = np.percentile(shares, [2.5, 97.5])
    return {"mean": float((none.mean() - values.mean()) / benefit), "low": float(low), "high": float(high)}
