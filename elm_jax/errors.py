"""The errors users see, and the hint towards the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ElmError(ValueError):
    """A user's mistake or a damaged file; its message is one line: what, where, the remedy."""


class Preempted(ElmError):
    """A run was asked to stop, and wrote a checkpoint; the exit status asks to be started again."""

    exit_status = 75


class TrainingDiverged(ElmError):
    """The loss stopped being finite; the last good checkpoint is kept."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Returns a hint naming the closest candidate, or an empty string.

    >>> nearest('adaptor', ['adapter', 'lora', 'full'])
    " (did you mean 'adapter'?)"
    >>> nearest('zzz', ['adapter'])
    ''
    """
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""
