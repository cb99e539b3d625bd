"""What an index records about itself: format, settings, and everything its vectors depend on."""

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..config import IndexSettings
from ..errors import MismatchError

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
MANIFEST_KEY = b"refrag"
"""Key of the manifest in the table's schema metadata: it is written with the table, in one commit."""

WORDS = {"encoder": "encoder weights", "weights": "weights", "instruction": "question instruction"}
"""Names for messages, where the key itself says too little."""


@dataclass(frozen=True)
class Manifest:
    """The record in an index. Stored vectors are those of the encoder, so the projector and the decoder's weights may change."""

    settings: IndexSettings
    model: Mapping[str, str | int]
    """`RefragModel.fingerprint()`: hashes and sizes that the chunk vectors depend on."""
    retriever: Mapping[str, str | int]
    """`SentenceEncoder.identity()`: name, weights, pooling and question instruction of the retrieval vectors."""
    format_version: int = FORMAT_VERSION
    model_name: str = ""
    """The model's hub name, folder or `bundled`, for messages only: it is not compared."""

    @property
    def encoder_width(self) -> int:
        """Width of a chunk vector."""
        return int(self.model["encoder_width"])

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None, path: str) -> "Manifest":
        """The manifest in a table's schema metadata. Raises MismatchError when there is none or its format is another."""
        text = (metadata or {}).get(MANIFEST_KEY)
        if text is None:
            raise MismatchError(f"The table at {path} was not made by refrag: make an index with  refrag index build PATH… --index OTHER.")
        record = json.loads(text)
        version = record.get("format_version")
        if version != FORMAT_VERSION:
            raise MismatchError(f"The index at {path} has format {version}, this version of refrag reads format {FORMAT_VERSION}: {_rebuild(path)}.")
        known = {key: value for key, value in record["settings"].items() if key in IndexSettings.__dataclass_fields__}
        return cls(IndexSettings(**known), record["model"], record["retriever"], model_name=record.get("model_name", ""))

    def check_model(self, fingerprint: Mapping[str, Any], path: str, *, chunk_sizes: Collection[int] = ()) -> None:
        """Raises MismatchError unless a model with this fingerprint makes the same chunks and the same chunk vectors.

        `chunk_sizes` are those that the model may be loaded with.
        """
        differing = _differences(self.model, fingerprint)
        if differing:
            own = f"--model {self.model_name}" if self.model_name else "the --model it was made with"
            if _keys_that_differ(self.model, fingerprint) == ["chunk_size"] and self.model["chunk_size"] in chunk_sizes:
                own = f"--chunk-size {self.model['chunk_size']}"
            raise MismatchError(f"The index at {path} belongs to another model ({differing}): pass {own}, or {_rebuild(path)}.")

    def check_retriever(self, identity: Mapping[str, Any], path: str) -> None:
        """Raises MismatchError unless this retriever embeds questions into the space of the stored retrieval vectors."""
        differing = _differences(self.retriever, identity)
        if differing:
            raise MismatchError(f"The index at {path} was embedded by another retriever ({differing}): use {self.retriever['name']}, or {_rebuild(path)}.")


def _differences(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """In words, what differs; the projector's hash does not count, since no projected vectors are stored."""
    keys = _keys_that_differ(recorded, given)
    return "; ".join(f"{WORDS.get(key, key.replace('_', ' '))}: index {recorded[key]}, given {given.get(key)}" for key in keys)


def _keys_that_differ(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    return [key for key in recorded if not key.startswith("projector") and recorded[key] != given.get(key)]


def _rebuild(path: str) -> str:
    return f"make it anew with  refrag index build PATH… --index {path} --rebuild"
