"""Which chunks are expanded: the fixed rules, the learned policies, and the budget that all of them obey (paper section 3).

A policy scores chunks; the highest scores are expanded first, up to the budget. So every rule, learned or not, is
never over the budget and always tight.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .config import POLICIES, Budget
from .encoder import rms_normalize
from .errors import InputError, first_line

MASKED = -1e30
"""Logit of what cannot be picked: finite, so that no gradient becomes NaN."""


@dataclass(frozen=True)
class PolicyInputs:
    """What a policy may look at, for one prompt."""

    chunk_embeds: Float[Tensor, "chunk enc"]
    chunk_lengths: Int[Tensor, "chunk"]
    """Tokens per chunk: what its expansion costs, plus one."""
    passage_index: Int[Tensor, "chunk"]
    """Number of each chunk's passage."""
    question_embeds: Float[Tensor, "enc"] | None = None
    """The encoder's vector of the question."""
    perplexity: Callable[[], Float[Tensor, "chunk"]] | None = None
    """Computes the decoder's mean negative log-likelihood per chunk; called only by the rules that need it."""
    seed: int = 0

    @property
    def num_chunks(self) -> int:
        """Chunks of the prompt."""
        return self.chunk_lengths.shape[0]


Policy = Callable[[PolicyInputs], Tensor]
"""Anything that gives each chunk a score; the chunk with the highest is expanded first."""


# ── fixed rules ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _same(inputs: PolicyInputs) -> Float[Tensor, "chunk"]:
    return torch.zeros(inputs.num_chunks)


def _random(inputs: PolicyInputs) -> Float[Tensor, "chunk"]:
    return torch.rand(inputs.num_chunks, generator=torch.Generator().manual_seed(inputs.seed))


def _first(inputs: PolicyInputs) -> Float[Tensor, "chunk"]:
    return -torch.arange(inputs.num_chunks, dtype=torch.float32)


def _similarity(inputs: PolicyInputs) -> Float[Tensor, "chunk"]:
    """Cosine of question and chunk, both less the mean chunk: encoder vectors share a large common part that says nothing."""
    if inputs.question_embeds is None:
        raise InputError("The similarity policy needs the question's vector, none was given: choose --policy first or random.")
    chunks, question = inputs.chunk_embeds.float(), inputs.question_embeds.float()
    centre = chunks.mean(0) if inputs.num_chunks > 1 else torch.zeros_like(question)
    return F.cosine_similarity(chunks - centre, (question - centre).unsqueeze(0), dim=-1)


def _perplexity(inputs: PolicyInputs) -> Float[Tensor, "chunk"]:
    if inputs.perplexity is None:
        raise InputError("The perplexity policies need the decoder's token probabilities, none were given: choose --policy similarity.")
    return inputs.perplexity()


def _low_perplexity(inputs: PolicyInputs) -> Float[Tensor, "chunk"]:
    return -_perplexity(inputs)


RULES: dict[str, Policy] = {
    "none": _same,
    "all": _same,
    "random": _random,
    "first": _first,
    "similarity": _similarity,
    "perplexity": _perplexity,
    "perplexity-low": _low_perplexity,
}
"""The fixed rules by name. `perplexity` keeps the hardest chunks as tokens (the paper's PPL-desc), `perplexity-low` the easiest."""


# ── the budget ───────────────────────────────────────────────────────────────────────────────────────────────────────


def select(
    scores: Float[Tensor, "chunk"],
    *,
    budget: Budget,
    chunk_lengths: Int[Tensor, "chunk"],
    base_slots: int,
    default_fraction: float,
) -> Bool[Tensor, "chunk"]:
    """Expand in the order of the scores (equal ones in chunk order) up to the budget: never over it, and tight.

    `base_slots` are the slots of the whole prompt with nothing expanded; expanding a chunk of n tokens adds n - 1.
    A fraction p means at most floor(p * L) of L chunks, a number at most itself, `max_slots` stops before the first
    chunk that would not fit; without a budget `default_fraction` holds, and one chunk at the least unless it is 0.
    Raises InputError for scores that are not numbers and for a `max_slots` that even the compressed prompt exceeds.
    """
    if scores.isnan().any():
        raise InputError("A policy must give each chunk a number, NaN was given: check the policy, or choose --policy similarity.")
    order = torch.sort(scores.float(), descending=True, stable=True).indices.to(chunk_lengths.device)
    if budget.max_slots is not None:
        if base_slots > budget.max_slots:
            over = base_slots - budget.max_slots
            raise InputError(
                f"The prompt takes {base_slots} slots with nothing expanded, {over} more than max_slots {budget.max_slots}: "
                f"raise --max-slots to {base_slots}, or read fewer passages with --top-k."
            )
        slots = base_slots + torch.cumsum(chunk_lengths[order] - 1, dim=0)
        num = int((slots <= budget.max_slots).sum())  # slots never falls, so this is a prefix of the order
    else:
        num = _num_chunks(budget, len(order), default_fraction)
    mask = torch.zeros(len(order), dtype=torch.bool, device=chunk_lengths.device)
    mask[order[:num]] = True
    return mask


def _num_chunks(budget: Budget, num_chunks: int, default_fraction: float) -> int:
    """T' of a budget in chunks: floor(p * L), where 0.29 of 100 is 29 whatever binary fractions say."""
    if budget.expand_chunks is not None:
        return min(budget.expand_chunks, num_chunks)
    fraction = default_fraction if budget.expand_fraction is None else budget.expand_fraction
    least = 1 if budget.expand_fraction is None and fraction else 0
    return min(max(least, math.floor(fraction * num_chunks + 1e-9)), num_chunks)


def decide(
    policy: str | Policy,
    inputs: PolicyInputs,
    *,
    budget: Budget,
    base_slots: int,
    default_fraction: float,
    learned: nn.Module | None = None,
) -> tuple[Bool[Tensor, "chunk"], Float[Tensor, "chunk"]]:
    """(expand_mask, scores) of a rule's name, `learned` (the module given as `learned`), or any callable.

    `none` expands nothing whatever the budget; `all` expands everything.
    Raises InputError for an unknown name, for `all` with a smaller budget, and as `select` does.
    """
    try:
        scores = _policy(policy, learned)(inputs)
    except (AttributeError, TypeError) as error:
        if isinstance(policy, str):
            raise
        wanted = f"it gets one PolicyInputs ({', '.join(own.name for own in fields(PolicyInputs))}) and returns a score per chunk"
        raise InputError(f"The policy's function failed ({type(error).__name__}: {first_line(error)}): {wanted}.") from error
    if not isinstance(scores, Tensor):
        scores = _as_scores(scores)
    if scores.shape != inputs.chunk_lengths.shape:
        raise InputError(f"A policy must give one score per chunk ({inputs.num_chunks}), the scores had shape {tuple(scores.shape)}.")
    if policy == "none" and budget.max_slots is None:
        budget = Budget(expand_chunks=0)
    default = 1.0 if policy == "all" else default_fraction
    mask = select(scores, budget=budget, chunk_lengths=inputs.chunk_lengths, base_slots=base_slots, default_fraction=default)
    if policy == "all" and not mask.all():
        raise InputError(
            f"The policy 'all' expands all {len(mask)} chunks, the budget allows {int(mask.sum())}: "
            "leave the budget out, or choose another --policy."
        )
    return (torch.zeros_like(mask) if policy == "none" else mask), scores


def _as_scores(scores: Any) -> Tensor:
    """What a policy of one's own returned: a list or an array of numbers will do."""
    try:
        return torch.as_tensor(scores, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"A policy must give one number per chunk, gave a {type(scores).__name__} ({first_line(error)}): return a tensor or a list of numbers.") from error


def _policy(policy: str | Policy, learned: nn.Module | None) -> Policy:
    """The callable behind a name."""
    if not isinstance(policy, str):
        return policy
    if policy == "learned":
        if learned is None:
            raise InputError("This model has no trained policy: choose --policy similarity, or train one.")
        return learned_rule(learned)
    if policy not in RULES:
        raise InputError(f"The policy must be one of {', '.join(POLICIES)}, was {policy!r}.")
    return RULES[policy]


def learned_rule(module: nn.Module) -> Policy:
    """A learned policy as a `Policy`: its logits for one prompt; taking the top T' of them is the paper's greedy choice."""
    return lambda inputs: learned_scores(module, [inputs])[0]


@torch.no_grad()
def learned_scores(module: nn.Module, prompts: Sequence[PolicyInputs]) -> list[Float[Tensor, "_"]]:
    """The logits of a learned policy for several prompts: those of about the same length share a forward."""
    scores = [torch.zeros(0)] * len(prompts)
    alike: dict[int, list[int]] = {}
    for number, inputs in enumerate(prompts):
        if inputs.num_chunks:
            alike.setdefault(inputs.num_chunks.bit_length(), []).append(number)
    device = next(module.parameters()).device
    for numbers in alike.values():
        group = [prompts[number] for number in numbers]
        lengths = torch.tensor([inputs.num_chunks for inputs in group])
        chunks, passages = (pad_sequence(list(rows), batch_first=True).to(device) for rows in zip(*((own.chunk_embeds, own.passage_index) for own in group), strict=True))
        # no mask where there is no padding: the layers are about twice as fast then
        mask = None if lengths.min() == lengths.max() else torch.arange(chunks.shape[1], device=device) < lengths.to(device)[:, None]
        asked = [own.question_embeds for own in group if own.question_embeds is not None]
        question = torch.stack(asked).to(device) if len(asked) == len(group) else None
        logits = module(chunks, mask, question_embeds=question, passage_index=passages).to(group[0].chunk_embeds.device)
        for number, row, length in zip(numbers, logits, lengths.tolist(), strict=True):
            scores[number] = row[:length]
    return scores


# ── learned policies ─────────────────────────────────────────────────────────────────────────────────────────────────


class MlpPolicy(nn.Module):
    """A logit per chunk from its own vector alone, or with the question: (c, q, c * q). The prototype's classifier."""

    def __init__(self, encoder_width: int, hidden_width: int, *, question_aware: bool) -> None:
        super().__init__()
        self.question_aware = question_aware
        self.up = nn.Linear(encoder_width * (3 if question_aware else 1), hidden_width)
        self.middle = nn.Linear(hidden_width, hidden_width)
        self.logit = nn.Linear(hidden_width, 1)

    def reset_parameters(self) -> None:
        """torch's own random weights for every layer."""
        _reset(self)

    def forward(
        self,
        chunk_embeds: Float[Tensor, "batch chunk enc"],
        chunk_mask: Bool[Tensor, "batch chunk"] | None,
        question_embeds: Float[Tensor, "batch enc"] | None = None,
        passage_index: Int[Tensor, "batch chunk"] | None = None,
    ) -> Float[Tensor, "batch chunk"]:
        """Logits in float32, `MASKED` where `chunk_mask` is False (padding; None: nowhere); `passage_index` is not looked at."""
        dtype = self.up.weight.dtype
        features = rms_normalize(chunk_embeds).to(dtype)
        if self.question_aware:
            question = rms_normalize(_question(question_embeds)).to(dtype).unsqueeze(1).expand_as(features)
            features = torch.cat([features, question, features * question], dim=-1)
        hidden = F.gelu(self.middle(F.gelu(self.up(features))))
        logits = self.logit(hidden).squeeze(-1).float()
        return logits if chunk_mask is None else logits.masked_fill(~chunk_mask, MASKED)


class TransformerPolicy(nn.Module):
    """g_theta of the paper (section 3): a small transformer over the chunk vectors, one logit per chunk, computed once.

    A chunk sees its place in the prompt (sinusoids) and the mean vector of its passage; with `question_aware` the
    question is one more element of the sequence, which is our step beyond the paper.
    """

    def __init__(self, encoder_width: int, hidden_width: int, *, num_layers: int = 2, num_heads: int = 4, question_aware: bool) -> None:
        super().__init__()
        self.question_aware = question_aware
        self.chunk = nn.Linear(encoder_width, hidden_width)
        self.passage = nn.Linear(encoder_width, hidden_width, bias=False)
        self.question = nn.Linear(encoder_width, hidden_width) if question_aware else None
        layer = nn.TransformerEncoderLayer(
            hidden_width, num_heads, 4 * hidden_width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, norm=nn.LayerNorm(hidden_width), enable_nested_tensor=False)
        self.logit = nn.Linear(hidden_width, 1)

    def reset_parameters(self) -> None:
        """torch's own random weights for every layer."""
        _reset(self)

    def forward(
        self,
        chunk_embeds: Float[Tensor, "batch chunk enc"],
        chunk_mask: Bool[Tensor, "batch chunk"] | None,
        question_embeds: Float[Tensor, "batch enc"] | None = None,
        passage_index: Int[Tensor, "batch chunk"] | None = None,
    ) -> Float[Tensor, "batch chunk"]:
        """Logits in float32, `MASKED` where `chunk_mask` is False (padding); without `passage_index` all chunks are one passage.

        No mask means no padding: the layers are about twice as fast then, the same up to rounding.
        """
        dtype, real = self.chunk.weight.dtype, chunk_mask
        if real is None:
            real = torch.ones(chunk_embeds.shape[:2], dtype=torch.bool, device=chunk_embeds.device)
        vectors = rms_normalize(chunk_embeds).to(dtype) * real.unsqueeze(-1)
        if passage_index is None:
            passage_index = torch.zeros_like(real, dtype=torch.long)
        hidden = self.chunk(vectors) + self.passage(_passage_means(vectors, real, passage_index))
        hidden = hidden + _sinusoids(hidden.shape[1], hidden.shape[2], hidden)
        padding = None if chunk_mask is None else ~chunk_mask
        if self.question is not None:
            question = self.question(rms_normalize(_question(question_embeds)).to(dtype))
            hidden = torch.cat([question.unsqueeze(1), hidden], dim=1)
            padding = None if padding is None else F.pad(padding, (1, 0), value=False)
        hidden = self.layers(hidden, src_key_padding_mask=padding)[:, -chunk_embeds.shape[1] :]
        return self.logit(hidden).squeeze(-1).float().masked_fill(~real, MASKED)


def _question(question_embeds: Tensor | None) -> Tensor:
    if question_embeds is None:
        raise InputError("The learned policy of this model looks at the question, no question vector was given: choose --policy first or random.")
    return question_embeds


def _passage_means(
    vectors: Float[Tensor, "batch chunk enc"], mask: Bool[Tensor, "batch chunk"], passage_index: Int[Tensor, "batch chunk"]
) -> Float[Tensor, "batch chunk enc"]:
    """For each chunk the mean vector of its own passage's chunks; `vectors` are zero where the mask is False."""
    same = (passage_index.unsqueeze(1) == passage_index.unsqueeze(2)) & mask.unsqueeze(1)
    weights = same.to(vectors.dtype)
    return weights @ vectors / weights.sum(-1, keepdim=True).clamp(min=1)


def _sinusoids(length: int, width: int, like: Tensor) -> Float[Tensor, "chunk hidden"]:
    """The transformer's sine and cosine positions."""
    rates = torch.exp(torch.arange(0, width, 2, device=like.device) * (-math.log(10000.0) / width))
    angles = torch.arange(length, device=like.device).unsqueeze(1) * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width].to(like.dtype)


def _reset(module: nn.Module) -> None:
    for child in module.modules():
        if child is not module:
            reset = getattr(child, "reset_parameters", None) or getattr(child, "_reset_parameters", None)
            if reset is not None:
                reset()


# ── sampling without replacement (training) ──────────────────────────────────────────────────────────────────────────


def sample(
    logits: Float[Tensor, "*batch chunk"], num: int, *, generator: torch.Generator | None = None
) -> tuple[Int[Tensor, "*batch pick"], Float[Tensor, "*batch pick"]]:
    """Draw `num` different chunks one after another, and the log-probability of each draw.

    Gumbel noise plus a sort is the same as sampling, masking and renormalising step by step. `num` may not exceed the
    chunks a row really has.
    """
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device).clamp(min=1e-20)
    indices = (logits - torch.log(-torch.log(uniform))).topk(num, dim=-1).indices
    return indices, log_prob(logits, indices)


def log_prob(logits: Float[Tensor, "*batch chunk"], indices: Int[Tensor, "*batch pick"]) -> Float[Tensor, "*batch pick"]:
    """log pi(l_t | x, l_<t) of each pick in this order: the softmax over what was not picked before (paper section 3).

    Index -1 pads rows with fewer picks and has log-probability 0. Differentiable; each row costs O(chunks).
    """
    valid = indices >= 0
    safe = indices.clamp(min=0)
    picked = logits.gather(-1, safe).masked_fill(~valid, MASKED)
    taken = torch.zeros(logits.shape, dtype=torch.long, device=logits.device).scatter_add_(-1, safe, valid.long()) > 0
    rest = logits.masked_fill(taken, MASKED).logsumexp(-1, keepdim=True)
    # what was still there at pick t: everything never picked, and the picks from t on
    remaining = torch.cat([rest, picked.flip(-1)], dim=-1).logcumsumexp(-1)[..., 1:].flip(-1)
    return torch.where(valid, picked - remaining, torch.zeros_like(picked))
