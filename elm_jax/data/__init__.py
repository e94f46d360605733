"""Examples, vocabularies, tables and batches; seqio tasks are in `elm_jax.data.tasks`."""

from elm_jax.data.batches import BatchStream, fit_lengths, pad_batches
from elm_jax.data.corpus import Corpus, DenoisingStream, load_corpus
from elm_jax.data.examples import (
    Example,
    TaskData,
    by_prompt,
    find_tasks,
    read_jsonl,
    with_answer_choices,
)
from elm_jax.data.table import ExampleTable, tokenize
from elm_jax.data.vocabulary import (
    ByteVocabulary,
    Vocabulary,
    load_vocabulary,
    train_vocabulary,
)

__all__ = [
    "BatchStream",
    "ByteVocabulary",
    "Corpus",
    "DenoisingStream",
    "Example",
    "ExampleTable",
    "TaskData",
    "Vocabulary",
    "by_prompt",
    "find_tasks",
    "fit_lengths",
    "load_corpus",
    "load_vocabulary",
    "pad_batches",
    "read_jsonl",
    "tokenize",
    "train_vocabulary",
    "with_answer_choices",
]
