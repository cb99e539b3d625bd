"""Passages, retrieval vectors and chunk vectors on disk: made once, read for every question."""

from .build import building
from .ingest import read_passages
from .prototype import import_prototype
from .retrieve import FaissRetriever, Hit, SentenceEncoder
from .store import PassageIndex

__all__ = ["FaissRetriever", "Hit", "PassageIndex", "SentenceEncoder", "building", "import_prototype", "read_passages"]
