"""REFRAG (arXiv 2509.01092): retrieval-augmented generation over compressed chunks.

text -> chunks -> vectors -> decision -> mixed input -> tokens. Names are imported on first use, so that
`import refrag` stays cheap; importing any model class registers `refrag` with transformers' Auto classes.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Answer": "engine",
    "Budget": "config",
    "GenerationSettings": "config",
    "IndexSettings": "config",
    "Passage": "text",
    "PassageIndex": "index",
    "PolicyInputs": "policy",
    "Refrag": "engine",
    "RefragConfig": "model",
    "RefragError": "errors",
    "RefragModel": "model",
    "Request": "engine",
    "Turn": "text",
    "VllmBackend": "engine",
    "VllmSettings": "config",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'refrag' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
