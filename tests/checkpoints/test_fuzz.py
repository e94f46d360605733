"""A short run of `fuzz.py`."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def test_damaged_checkpoints_are_errors_of_the_user() -> None:
    spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).with_name("fuzz.py"))
    assert spec is not None and spec.loader is not None
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    failures = fuzz.run(None, 150, seed=1)
    assert not failures, "\n".join(failures[:3])
