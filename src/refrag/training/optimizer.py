"""Muon for the matrices inside the networks, AdamW for everything else, behind one optimizer."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import InputError


class MuonAdamW(torch.optim.Optimizer):
    """torch.optim.Muon on hidden matrices and AdamW on embeddings, heads, norms and biases.

    Muon's steps are scaled to AdamW's size (`match_rms_adamw`), so one learning rate serves both.
    Raises InputError where torch has no Muon (before 2.9).
    """

    def __init__(self, model: nn.Module, *, lr: float, weight_decay: float = 0.0) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise InputError(f"The muon optimizer needs torch 2.9 or later, this is {torch.__version__}: use adamw.")
        found = [m.get_output_embeddings() for m in model.modules() if isinstance(m, PreTrainedModel)]
        heads = [head for head in found if head is not None]
        tables = {id(p) for m in (*heads, *(m for m in model.modules() if isinstance(m, nn.Embedding))) for p in m.parameters()}
        trained = [p for p in model.parameters() if p.requires_grad]
        hidden = [p for p in trained if p.ndim == 2 and id(p) not in tables]
        taken = {id(p) for p in hidden}
        rest = [p for p in trained if id(p) not in taken]
        self._parts: list[torch.optim.Optimizer] = [torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")]
        if rest:
            self._parts.append(torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """The parts read the very groups that a learning-rate schedule writes."""
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]

    def step(self, closure: Any = None) -> None:  # ty: ignore[incompatible-method-override]
        for part in self._parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self._parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self._parts for group in part.param_groups]
