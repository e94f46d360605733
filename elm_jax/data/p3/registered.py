"""Importing this module registers P3 in seqio, for tools that take a module's name.

Where the rows are is read from the environment (`P3Source.from_environment`), and the SentencePiece
model from ELM_JAX_VOCABULARY. For seqio's cache:

    seqio_cache_tasks --module_import=elm_jax.data.p3.registered \\
        --tasks='elm_jax:p3:cosmos_qa:.*' --output_cache_dir=CACHE
"""

import os
from pathlib import Path

from elm_jax.data.p3.sources import P3Source
from elm_jax.data.p3.tasks import register_all
from elm_jax.data.vocabulary import Vocabulary
from elm_jax.errors import ElmError

VOCABULARY = "ELM_JAX_VOCABULARY"

if VOCABULARY not in os.environ:
    raise ElmError(f"{VOCABULARY} should name the SentencePiece model that encodes the tasks")
NAMES = register_all(P3Source.from_environment(), Vocabulary(Path(os.environ[VOCABULARY])))
"""What was registered."""
