"""Sizes that data decide, rounded so that few of them are ever compiled."""

from __future__ import annotations

from typing import Any

import numpy as np


def round_up(size: int) -> int:
    """Returns the least 2^k or 3 * 2^k that is not below `size`.

    >>> [round_up(n) for n in (1, 2, 3, 5, 7, 33, 49, 65)]
    [1, 2, 3, 6, 8, 48, 64, 96]
    """
    power = 1 << max(size - 1, 0).bit_length()
    return power * 3 // 4 if power * 3 // 4 >= max(size, 1) else power


def trim_padding(tokens: Any, minimum: int = 32) -> Any:
    """Cuts the columns that are padding in every row, down to a rounded length.

    Only NumPy arrays are cut: an array on a device, or one being traced, keeps its shape.

    Args:
      tokens: int32 [B, T], 0 is padding.
      minimum: shortest length to cut to.

    >>> trim_padding(np.eye(3, 512, k=38, dtype=np.int32)).shape
    (3, 48)
    """
    if not isinstance(tokens, np.ndarray):
        return tokens
    used = np.flatnonzero((tokens != 0).any(axis=0))
    length = round_up(max(int(used[-1]) + 1 if used.size else 1, minimum))
    return tokens[:, :length]
