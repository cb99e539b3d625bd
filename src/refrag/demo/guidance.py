"""Attention guidance for the bundled decoder: a pair of heads is shown which passage's header a citation is about.

Tiny decoders find out very late that the name in a question stands for the passage with that title. So while the bundled
decoder is trained, the first heads of one layer are rewarded for looking, from the slot before a citation, at the header
(`[2] Title`) of the passage that is cited. The loss is the negative log of that attention; the model's computation is unchanged.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LAYER, HEADS = 3, 2
NAME = "sdpa_guided"
_HIDDEN = -1e4


class Guide:
    """Knows the tokens of headers, and holds what the attention of one forward pass is compared with."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.number_of = torch.zeros(len(tokenizer), dtype=torch.long)
        for number, ids in enumerate(tokenizer([f"[{n}]" for n in range(1, 9)], add_special_tokens=False)["input_ids"], start=1):
            assert len(ids) == 1, "the almanac's tokenizer keeps [1] to [8] whole"
            self.number_of[ids[0]] = number
        self.newline = tokenizer("\n", add_special_tokens=False)["input_ids"][0]
        self.plan: tuple[Tensor, Tensor, Tensor] | None = None
        self.loss: Tensor | None = None
        for layer in (m for m in model.modules() if type(m).__name__ == "LlamaAttention" and m.layer_idx == LAYER):
            layer.guide = self
        model.set_attn_implementation(NAME)

    def set(self, slot_ids: Tensor, labels: Tensor, segments: Tensor) -> None:
        """`slot_ids` [batch slot] (-1 for a vector or padding), `labels` and `segments` as the trainer has them."""
        headers = self._headers(torch.where(segments == 0, slot_ids, -1))
        cited = torch.where((labels > 0) & (segments > 0), self.number_of[labels.clamp(min=0)], 0)
        batch, slot = cited[:, 1:].nonzero(as_tuple=True)  # the slot before each citation
        self.plan = (batch, slot, headers[batch] == cited[batch, slot + 1][:, None]) if len(batch) else None
        self.loss = None

    def _headers(self, slot_ids: Tensor) -> Tensor:
        """The number of the passage whose header a slot belongs to, 0 elsewhere."""
        numbers = self.number_of[slot_ids.clamp(min=0)] * (slot_ids >= 0)
        headers, current = torch.zeros_like(numbers), torch.zeros(len(numbers), dtype=torch.long)
        for slot in range(numbers.shape[1]):
            current = torch.where(numbers[:, slot] > 0, numbers[:, slot], current)
            headers[:, slot] = current
            current = torch.where(slot_ids[:, slot] == self.newline, 0, current)
        return headers

    def watch(self, query: Tensor, key: Tensor, mask: Tensor, scaling: float) -> None:
        """Compare the first heads' attention with the plan; query and key [batch head slot dim], rotated."""
        assert self.plan is not None
        (batch, slot, targets), self.plan = self.plan, None
        scores = torch.einsum("rhd,rtd->rht", query[batch, :HEADS, slot].float(), key[batch, 0].float()) * scaling
        attention = scores.masked_fill(~mask[batch, 0, slot][:, None], _HIDDEN).log_softmax(-1)
        self.loss = -attention.masked_fill(~targets[:, None], _HIDDEN).logsumexp(-1).mean()


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    guide = getattr(module, "guide", None)
    if guide is not None and attention_mask is not None and torch.is_grad_enabled() and guide.plan is not None:
        guide.watch(query, key, attention_mask, module.scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
