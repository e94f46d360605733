"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from importlib.util import find_spec

# Before anything brings TensorFlow, after which Triton crashes; see `retrieval.embedder`.
if find_spec("triton"):
    import triton  # noqa: F401

# Tests compile many tiny programs: XLA's optimisation would take longer than it saves.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from tiny import compilation_cache  # noqa: E402, F401  (a fixture for all tests)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data: $ELM_JAX_DATA, else ../shared/data beside the repository."""
    named = os.environ.get("ELM_JAX_DATA")
    path = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; name its folder in ELM_JAX_DATA")
    return path
