"""A supervised start for the learned policy: where the chunks that hold the answer are known, it learns to rank them first."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


def gold_loss(logits: Float[Tensor, "batch chunk"], gold: Bool[Tensor, "batch chunk"]) -> Float[Tensor, ""]:
    """Mean negative log of a gold chunk's probability to be picked first (the policy's softmax), in nats; rows have a gold chunk."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.masked_fill(~gold, 0.0).sum(-1) / gold.sum(-1)).mean()


def gold_recall(logits: Float[Tensor, "batch chunk"], gold: Bool[Tensor, "batch chunk"], num_picks: int) -> float:
    """Share of gold chunks among the `num_picks` highest logits of their row."""
    picked = torch.zeros_like(gold).scatter_(1, logits.topk(min(num_picks, logits.shape[1])).indices, True)
    return ((picked & gold).sum() / gold.sum()).item()


class PolicyWithGold(nn.Module):
    """The policy and its loss in the shape that `transformers.Trainer` trains."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self,
        chunk_embeds: Float[Tensor, "batch chunk enc"],
        chunk_mask: Bool[Tensor, "batch chunk"],
        question_embeds: Float[Tensor, "batch enc"],
        passage_index: Int[Tensor, "batch chunk"],
        gold: Bool[Tensor, "batch chunk"],
    ) -> dict[str, Any]:
        logits = self.policy(chunk_embeds, chunk_mask, question_embeds=question_embeds, passage_index=passage_index)
        return {"loss": gold_loss(logits, gold), "logits": logits}
