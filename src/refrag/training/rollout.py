"""What the policy learns from (paper section 3): G sets of exactly T' chunks drawn from it, and how well the decoder then does.

The reward of a set is the negative log-perplexity of the gold continuation or answer, given the mixed input in which these
chunks are expanded. Encoder and decoder stay as they are, so one table of chunk vectors serves all sets in one batched forward.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..config import Budget
from ..errors import InputError
from ..layout import Layout, lay_out, mix, num_slots
from ..model import MAX_LOGITS, RefragModel
from ..policy import PolicyInputs, decide, log_prob, sample
from ..text import Prompt

MAX_SLOTS = 1 << 16
"""Slots that the decoder reads at a time while sets are scored."""


@dataclass(frozen=True)
class PolicyItem:
    """One input of the policy, and the gold text that its choice is judged by."""

    prompt: Prompt
    completion: list[int]
    """Token ids of the gold continuation or answer, behind the prompt."""
    question: str | None = None
    """What a question-aware policy looks at."""
    gold: list[bool] | None = None
    """The chunks that hold evidence; None: not known."""
    id: str = ""

    def __post_init__(self) -> None:
        """Raises InputError for an item that nothing could be learned from."""
        if not self.completion:
            raise InputError(f"The gold text of row {self.id!r} must have a token or more, was empty: give it an answer.")
        if not self.prompt.chunks:
            raise InputError(f"The context of row {self.id!r} must have a chunk or more, has none: give it a passage with text.")

    @property
    def num_tokens(self) -> int:
        """Tokens of text behind it."""
        return self.prompt.num_context_tokens + len(self.completion)


Reward = Callable[[RefragModel, PolicyItem, Tensor, Tensor], Tensor]
"""(model, item, chunk_embeds [chunk enc], expand_masks [group chunk]) -> one reward a mask [group]; higher is better."""


# ── rewards ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def rewards(
    model: RefragModel, item: PolicyItem, chunk_embeds: Float[Tensor, "chunk enc"], expand_masks: Bool[Tensor, "group chunk"]
) -> Float[Tensor, "group"]:
    """Negative log-perplexity (mean nats a token, so at most 0) of the item's completion under each mask; paper section 3.

    Equal masks are scored once, so their rewards are equal to the last bit. Vectors are projected once.
    """
    masks, of = expand_masks.cpu().unique(dim=0, return_inverse=True)
    projected, num = model.project(chunk_embeds), len(item.completion)
    slots = max(num_slots(item.prompt, mask) for mask in masks) + num
    rows = max(1, min(MAX_SLOTS // slots, MAX_LOGITS // (model.get_input_embeddings().num_embeddings * (num + 1))))
    scores = []
    for part in masks.split(rows):
        layout = lay_out([item.prompt] * len(part), list(part), completions=[item.completion] * len(part))
        scores.append(_scores(model, item.completion, share_chunk_table(layout), projected))
    return torch.cat(scores).to(chunk_embeds.device)[of.to(chunk_embeds.device)]


def share_chunk_table(layout: Layout) -> Layout:
    """A layout whose rows are one prompt under several masks, so that all rows look chunk c up in row c of one table.

    `lay_out` gives every row chunks of its own: row b's chunk c is `T + b * L + c`; here it is `T + c`.
    """
    num_tokens, num_chunks = len(layout.token_ids), layout.num_chunks // len(layout.source)
    assert layout.num_chunks == num_chunks * len(layout.source), "all rows have the same chunks"
    place = (layout.source - num_tokens).remainder(max(num_chunks, 1)) + num_tokens
    return replace(layout, source=torch.where(layout.source >= num_tokens, place, layout.source), num_chunks=num_chunks)


def _scores(model: RefragModel, completion: list[int], layout: Layout, projected: Float[Tensor, "chunk hidden"]) -> Float[Tensor, "group"]:
    """Mean log-probability (nats a token) of the completion in each row."""
    embedding, num = model.get_input_embeddings(), len(completion)
    device = embedding.weight.device
    mixed = mix(layout.to(device), embedding, projected.to(device))
    logits = model.decoder(
        inputs_embeds=mixed.inputs_embeds, attention_mask=mixed.attention_mask, position_ids=mixed.position_ids, use_cache=False, logits_to_keep=num + 1
    ).logits[:, -num - 1 : -1]
    targets = torch.tensor(completion, device=logits.device).expand(len(logits), -1)
    nll = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return -nll.view(targets.shape).mean(1)


# ── rollouts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def sense(model: RefragModel, items: Sequence[PolicyItem]) -> dict[str, Tensor]:
    """What the policy looks at, padded to the longest item, on its device; everything is encoded in one go.

    `chunk_embeds` [batch chunk enc], `chunk_mask`, `gold` (all False where it is not known) [batch chunk], `passage_index`
    [batch chunk], and `question_embeds` [batch enc] if each item has a question.
    """
    device = next(model.encoder.parameters()).device if model.policy is None else next(model.policy.parameters()).device
    counts = [len(item.prompt.chunks) for item in items]
    questions = [item.question for item in items if item.question is not None]
    asked = len(questions) == len(items)
    vectors = model.encode([text for item in items for text in item.prompt.chunk_texts()] + (questions if asked else [])).to(device)
    rows = vectors[: sum(counts)].split(counts)
    sensed = {
        "chunk_embeds": pad_sequence(list(rows), batch_first=True),
        "chunk_mask": torch.arange(max(counts), device=device) < torch.tensor(counts, device=device)[:, None],
        "passage_index": _padded([[chunk.passage for chunk in item.prompt.chunks] for item in items]).to(device),
        "gold": _padded([item.gold or [False] * count for item, count in zip(items, counts, strict=True)]).to(device),
    }
    return sensed | ({"question_embeds": vectors[sum(counts) :]} if asked else {})


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


@dataclass(frozen=True)
class Rollout:
    """G draws for each item of a micro-batch, padded to the longest: everything that an update needs."""

    chunk_embeds: Float[Tensor, "batch chunk enc"]
    chunk_mask: Bool[Tensor, "batch chunk"]
    passage_index: Int[Tensor, "batch chunk"]
    gold: Bool[Tensor, "batch chunk"]
    """Chunks that hold evidence; a row of False where it is not known."""
    indices: Int[Tensor, "batch group pick"]
    """The chunks drawn, in their order; -1 pads."""
    old_log_probs: Float[Tensor, "batch group pick"]
    """Log-probability of each draw when it was drawn; 0 where padded."""
    rewards: Float[Tensor, "batch group"]
    question_embeds: Float[Tensor, "batch enc"] | None = None
    ids: tuple[str, ...] = ()
    """The items, for messages."""

    @property
    def policy_inputs(self) -> dict[str, Any]:
        """What the policy's forward takes."""
        return {name: getattr(self, name) for name in ("chunk_embeds", "chunk_mask", "question_embeds", "passage_index")}

    @property
    def num_picks(self) -> Int[Tensor, "batch"]:
        """T' of each item."""
        return (self.indices[:, 0] >= 0).sum(-1)


def num_picks(expand_fraction: float, num_chunks: int) -> int:
    """T' = floor(p * L), where 0.29 of 100 is 29 whatever binary fractions say, as in `select`."""
    return min(math.floor(expand_fraction * num_chunks + 1e-9), num_chunks)


@torch.no_grad()
def roll_out(
    model: RefragModel,
    items: Sequence[PolicyItem],
    *,
    picks: Sequence[int],
    group_size: int,
    generator: torch.Generator,
    reward: Reward = rewards,
) -> Rollout:
    """`group_size` draws for each item of exactly `picks[b]` different chunks from the policy as it is, and their rewards.

    `generator` is a CPU one, so that draws do not depend on the device. Memory: one item's group is scored at a time, in
    parts if it is large.
    """
    assert model.policy is not None
    sensed = sense(model, items)
    gold = sensed.pop("gold")
    logits = model.policy(**sensed)
    indices = torch.full((len(items), group_size, max(1, *picks)), -1)
    given = torch.zeros(len(items), group_size, device=logits.device)
    for row, (item, num) in enumerate(zip(items, picks, strict=True)):
        count = len(item.prompt.chunks)
        drawn = sample(logits[row, :count].cpu().expand(group_size, -1), num, generator=generator)[0]
        indices[row, :, :num] = drawn
        masks = torch.zeros(group_size, count, dtype=torch.bool).scatter_(1, drawn, True)
        given[row] = reward(model, item, sensed["chunk_embeds"][row, :count], masks)
    indices = indices.to(logits.device)
    old = log_prob(logits[:, None].expand(-1, group_size, -1), indices)
    return Rollout(**sensed, gold=gold, indices=indices, old_log_probs=old, rewards=given, ids=tuple(item.id for item in items))


def save_rollouts(rollouts: dict[int, Rollout], path: Path) -> None:
    """Write rollouts by number (safetensors), to go on with after a stop; no file where there are none."""
    if not rollouts:
        return
    tensors = {
        f"{number}.{field.name}": value.cpu().clone(memory_format=torch.contiguous_format)
        for number, rollout in rollouts.items()
        for field in fields(rollout)
        if isinstance(value := getattr(rollout, field.name), Tensor)
    }
    save_file(tensors, path, metadata={str(number): json.dumps(rollout.ids) for number, rollout in rollouts.items()})


def load_rollouts(path: Path, device: torch.device) -> dict[int, Rollout]:
    """What `save_rollouts` wrote, bit for bit; nothing where there is no file."""
    if not path.exists():
        return {}
    with safe_open(path, framework="pt", device=str(device)) as file:
        parts: dict[int, dict[str, Any]] = {int(number): {"ids": tuple(json.loads(ids))} for number, ids in (file.metadata() or {}).items()}
        for key in file.keys():  # noqa: SIM118
            number, name = key.split(".")
            parts[int(number)][name] = file.get_tensor(key)
    return {number: Rollout(**part) for number, part in parts.items()}


# ── rules at equal budget ────────────────────────────────────────────────────────────────────────────────────────────


def chosen(rule: str, inputs: PolicyInputs, *, expand_fraction: float, learned: Any = None) -> Bool[Tensor, "chunk"]:
    """The chunks a rule expands: exactly floor(p * L) of them, but for `none` and `all`."""
    budget = Budget() if rule == "all" else Budget(expand_fraction=expand_fraction)
    return decide(rule, inputs, budget=budget, base_slots=0, default_fraction=1.0, learned=learned)[0]


@dataclass(frozen=True)
class Choice:
    """What one rule chose for one item at one budget."""

    expand_fraction: float
    rule: str
    reward: float
    found: int
    """Gold chunks among the expanded."""
    gold: int
    """Gold chunks."""


@torch.no_grad()
def choices(
    model: RefragModel, item: PolicyItem, *, fractions: Sequence[float], rules: Sequence[str], seed: int = 0, reward: Reward = rewards
) -> list[Choice]:
    """What each rule (`learned` is the model's policy) chooses for an item at each budget, and its reward; all in one batch.

    `similarity` is left out where the item has no question.
    """
    sensed = sense(model, [item])
    inputs = PolicyInputs(
        chunk_embeds=sensed["chunk_embeds"][0],
        chunk_lengths=torch.tensor([len(chunk.token_ids) for chunk in item.prompt.chunks]),
        passage_index=sensed["passage_index"][0],
        question_embeds=sensed["question_embeds"][0] if "question_embeds" in sensed else None,
        perplexity=lambda: model.chunk_perplexity(item.prompt),
        seed=seed,
    )
    pairs = [(fraction, rule) for fraction in fractions for rule in rules if rule != "similarity" or inputs.question_embeds is not None]
    masks = torch.stack([chosen(rule, inputs, expand_fraction=fraction, learned=model.policy) for fraction, rule in pairs])
    given = reward(model, item, inputs.chunk_embeds, masks).tolist()
    gold = sensed["gold"][0].cpu()
    found = (masks & gold).sum(1).tolist()
    return [Choice(*pair, own, hits, int(gold.sum())) for pair, own, hits in zip(pairs, given, found, strict=True)]
