"""Refuses, in runs of t5x's scripts, settings that nothing reads; `gin/t5x/model.gin` imports it.

gin takes a macro that nobody reads without a word, so that a misspelt one would do nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import t5x
from absl import flags

import gin
from elm_jax import gin_check

SCRIPTS = {"train": "train", "eval": "evaluate", "infer": "infer"}
"""t5x's scripts and the functions that they call."""


def check_settings(config: Any = None) -> None:
    """Checks gin's current configuration against the flags of the t5x script that runs.

    Elsewhere, such as in a program of the user's own, nothing is checked.

    Raises:
      ElmError: as `gin_check.check_use`.
    """
    del config  # gin gives it to its hooks
    script = sys.modules["__main__"]
    name = getattr(getattr(script, "__spec__", None), "name", "")
    given: Any = flags.FLAGS
    if name.removeprefix("t5x.") not in SCRIPTS or not hasattr(given, "gin_bindings"):
        return
    gin_check.check_use(
        getattr(script, SCRIPTS[name.removeprefix("t5x.")]),
        given.gin_file,
        given.gin_bindings,
        gin_check.search_folders(given.gin_search_paths),
        [gin_check.search_folders()[0], Path(t5x.__file__).parent],
    )


gin.config.register_finalize_hook(check_settings)
