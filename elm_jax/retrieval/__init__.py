"""Retrieval of experts: which trained expert suits a task nobody trained on.

Instances are embedded in one text form, stored as keys of the experts trained on them, and searched
by maximum inner product; the queries of a new task vote for the expert that owns their nearest key.
"""

from elm_jax.retrieval.compare import LibraryChange, compare_libraries
from elm_jax.retrieval.embedder import (
    CachedEmbedder,
    Embedder,
    SentenceEmbedder,
    load_embedder,
)
from elm_jax.retrieval.index import MaxInnerProductIndex
from elm_jax.retrieval.library import (
    KeySpace,
    Library,
    LibraryEntry,
    Retrieval,
    StoredExpert,
    read_expert_entry,
    read_store,
)
from elm_jax.retrieval.supervised import (
    SupervisedConfig,
    SupervisedEmbedder,
    load_retriever,
    train_retriever,
)
from elm_jax.retrieval.text import TEXT_FORMAT, TEXT_FORMATS, format_instance, read_texts
from elm_jax.retrieval.vote import Candidate, majority_vote

__all__ = [
    "TEXT_FORMAT",
    "TEXT_FORMATS",
    "CachedEmbedder",
    "Candidate",
    "Embedder",
    "KeySpace",
    "Library",
    "LibraryChange",
    "LibraryEntry",
    "MaxInnerProductIndex",
    "Retrieval",
    "SentenceEmbedder",
    "StoredExpert",
    "SupervisedConfig",
    "SupervisedEmbedder",
    "compare_libraries",
    "format_instance",
    "load_embedder",
    "load_retriever",
    "majority_vote",
    "read_expert_entry",
    "read_store",
    "read_texts",
    "train_retriever",
]
