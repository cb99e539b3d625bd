"""Attention guidance for the bundled decoder: two pairs of heads are shown where to look.

Tiny decoders find out very late that the name in a question stands for the passage with that title, and which vector holds an
answer. So while the bundled decoder is trained, the first heads of `CITE_LAYER` are rewarded for looking, from the slot before
a citation, at the headers (`[2] Title`) with the title of the passage cited, and those of `READ_LAYER`, from there and from the
slot before each token of the answer's words, at the place it is copied from: the token in its passage, or the vector of the
chunk that holds it. (A header stands before its passage and cannot say what the passage states.) The loss is the negative log of that attention; what the model computes is unchanged.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CITE_LAYER, READ_LAYER, HEADS = 3, 4, 2
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
        self.plan: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.losses: dict[int, Tensor] = {}
        for layer in (m for m in model.modules() if type(m).__name__ == "LlamaAttention"):
            layer.guide = self
        model.set_attn_implementation(NAME)

    def set(self, slot_ids: Tensor, labels: Tensor, segments: Tensor, pointers: Tensor, titles: Tensor) -> None:
        """`slot_ids` [batch slot] (-1 for a vector or padding), `labels` and `segments` as the trainer has them.

        `pointers` [pair 3]: row, slot that predicts a token of an answer, slot that holds it. `titles` [batch 9]: which title
        each number of a passage has.
        """
        headers = self._headers(torch.where(segments == 0, slot_ids, -1))
        cited = torch.where((labels > 0) & (segments > 0), self.number_of[labels.clamp(min=0)], 0)
        batch, slot = cited[:, 1:].nonzero(as_tuple=True)  # the slot before each citation
        self.losses = {}
        title = titles.gather(1, headers)  # 0 outside headers
        wanted = titles[batch, cited[batch, slot + 1]]
        self.plan = {CITE_LAYER: (batch, slot, title[batch] == wanted[:, None])} if len(batch) else {}
        if len(pointers):
            row, predicting, holding = pointers.T
            self.plan[READ_LAYER] = (row, predicting, nn.functional.one_hot(holding, labels.shape[1]).bool())

    def _headers(self, slot_ids: Tensor) -> Tensor:
        """The number of the passage whose header a slot belongs to, 0 elsewhere."""
        numbers = self.number_of[slot_ids.clamp(min=0)] * (slot_ids >= 0)
        headers, current = torch.zeros_like(numbers), torch.zeros(len(numbers), dtype=torch.long)
        for slot in range(numbers.shape[1]):
            current = torch.where(numbers[:, slot] > 0, numbers[:, slot], current)
            headers[:, slot] = current
            current = torch.where(slot_ids[:, slot] == self.newline, 0, current)
        return headers

    def watch(self, layer: int, query: Tensor, key: Tensor, *, mask: Tensor, scaling: float) -> None:
        """Compare the first heads' attention with the plan; query and key [batch head slot dim], rotated."""
        batch, slot, targets = self.plan.pop(layer)
        scores = torch.einsum("rhd,rtd->rht", query[batch, :HEADS, slot].float(), key[batch, 0].float()) * scaling
        attention = scores.masked_fill(~mask[batch, 0, slot][:, None], _HIDDEN).log_softmax(-1)
        self.losses[layer] = -attention.masked_fill(~targets[:, None], _HIDDEN).logsumexp(-1).mean()


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    guide = getattr(module, "guide", None)
    if guide is not None and attention_mask is not None and torch.is_grad_enabled() and module.layer_idx in guide.plan:
        guide.watch(module.layer_idx, query, key, mask=attention_mask, scaling=module.scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
