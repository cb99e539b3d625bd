"""Log-likelihoods of given tokens after mixed inputs, by a RefragModel: what perplexity and the evaluation harness score by."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..layout import ExpandMask, lay_out
from ..model import MAX_LOGITS, RefragModel
from ..text import Prompt


@torch.no_grad()
def token_nll(
    model: RefragModel,
    prompts: Sequence[Prompt],
    expand_masks: Sequence[ExpandMask],
    completions: Sequence[Sequence[int]],
    chunk_embeds: Float[Tensor, "chunk enc"] | None,
) -> list[tuple[Float[Tensor, "_"], Float[Tensor, "_"]]]:
    """Per row (nll, is_greedy) of each token of its completion: nats, and 1.0 where it is the most likely token; float32, on the CPU.

    `chunk_embeds` has a row for every chunk of all prompts, expanded ones too; None where the prompts have no chunks.
    """
    assert all(completions), "a completion has a token or more"
    layout = lay_out(prompts, expand_masks, completions=completions)
    longest = max(map(len, completions))
    logits = model(layout=layout, chunk_embeds=chunk_embeds, labels=None, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1]
    return [_row(own[longest - len(completion) :], completion) for own, completion in zip(logits, completions, strict=True)]  # rows are left-padded


def _row(logits: Float[Tensor, "token vocab"], completion: Sequence[int]) -> tuple[Float[Tensor, "token"], Float[Tensor, "token"]]:
    """Float32 copies of the logits are made for a part of the tokens at a time: they are the largest thing here."""
    targets = torch.tensor(completion, device=logits.device)
    size = max(1, MAX_LOGITS // 4 // logits.shape[1])
    parts = [(F.cross_entropy(own.float(), of, reduction="none"), (own.argmax(-1) == of).float()) for own, of in zip(logits.split(size), targets.split(size), strict=True)]
    nll, greedy = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return nll, greedy
