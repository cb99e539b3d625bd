"""Floating point operations: counted by torch on the meta device with eager attention, where no kernel hides what it does.

A decoder's count over n slots is a polynomial: a fixed part (the logits of the last slot), one a slot, one a pair of slots.
Three counts give its whole coefficients exactly, whatever the architecture; causal kernels do only the pairs that look back.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForCausalLM

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FlopLaw:
    """Operations of a decoder's prefill over n slots, logits of the last slot only."""

    fixed: int
    per_slot: int
    per_pair: int
    """For each (slot, slot that it looks at)."""

    def counted(self, slots: int) -> int:
        """With the full square of attention: what a counter sees with eager attention."""
        return self.fixed + self.per_slot * slots + self.per_pair * slots**2

    def causal(self, slots: int) -> int:
        """With the pairs that causal attention needs: n (n + 1) / 2."""
        return self.fixed + self.per_slot * slots + self.per_pair * (slots * (slots + 1) // 2)


def count(work: Callable[[], object]) -> int:
    """Operations of matrix products in a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


def decoder_law(config: Any) -> FlopLaw:
    """The law of a decoder of this configuration (a PretrainedConfig)."""
    decoder = _on_meta(AutoModelForCausalLM, config)

    def prefill(slots: int) -> int:
        ids = torch.zeros(1, slots, dtype=torch.long, device="meta")
        mask = torch.ones_like(ids)  # without one, transformers looks for packed sequences, which needs values
        return count(lambda: decoder(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1))

    step = 16
    first, second, third = (prefill(step * times) for times in (1, 2, 3))
    per_pair = (third - 2 * second + first) // (2 * step**2)
    per_slot = (second - first - per_pair * 3 * step**2) // step
    law = FlopLaw(first - per_slot * step - per_pair * step**2, per_slot, per_pair)
    assert [law.counted(step * times) for times in (1, 2, 3)] == [first, second, third], "the counts follow no such polynomial"
    return law


def encoder_flops(config: Any, *, num_chunks: int, chunk_tokens: int) -> int:
    """Operations of an encoder over chunks of so many tokens (special ones included), none of which sees another."""
    encoder = _on_meta(AutoModel, config)
    if hasattr(encoder, "pooler"):
        encoder.pooler = None  # a RefragModel has none either
    ids = torch.zeros(1, chunk_tokens, dtype=torch.long, device="meta")
    return num_chunks * count(lambda: encoder(input_ids=ids).last_hidden_state)


def projector_flops(projector: nn.Module, *, num_chunks: int, encoder_width: int) -> int:
    """Operations of the projector over so many chunk vectors."""
    on_meta = copy.deepcopy(projector).to("meta")
    return count(lambda: on_meta(torch.zeros(num_chunks, encoder_width, device="meta")))


def policy_flops(policy: nn.Module, *, num_chunks: int, encoder_width: int) -> int:
    """Operations of a learned policy over so many chunk vectors, the question's vector at hand."""
    on_meta = copy.deepcopy(policy).to("meta").train()  # in eval mode torch fuses its layers into one that no counter sees
    chunks, question = torch.zeros(1, num_chunks, encoder_width, device="meta"), torch.zeros(1, encoder_width, device="meta")
    return count(lambda: on_meta(chunks, None, question_embeds=question))


def _on_meta(auto_class: Any, config: Any) -> Any:
    """A model of the configuration without weights, with eager attention, in eval mode."""
    with torch.device("meta"):
        return auto_class.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
