"""The models and experts of this library under Google's t5x trainer.

t5x keeps one `params` tree, so `models.ExpertModel` joins backbone and expert for it and splits
them again before `apply`. The configurations are in `gin/t5x/`, what to expect in `docs/t5x.md`.

t5x is not on PyPI and is optional: this package and `experts` work without it, the other modules
import it.
"""

from __future__ import annotations

import importlib.util


def is_available() -> bool:
    """Whether t5x can be imported; a mere folder of that name does not count."""
    spec = importlib.util.find_spec("t5x")
    return spec is not None and spec.origin is not None
