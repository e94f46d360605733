"""Greedy decoding: `generate` where nothing has to be chosen."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from elm_jax.decoding.config import GenerationConfig
from elm_jax.decoding.generation import generate
from elm_jax.models import T5


def greedy_decode(
    model: T5,
    variables: Any,
    encoder_input_tokens: np.ndarray | jax.Array,
    *,
    max_decode_len: int,
    eos_id: int = 1,
) -> jax.Array:
    """Decodes the likeliest token at each position; stops when every row has ended.

    Args:
      model: the backbone with its expert's spec.
      variables: `params` and, with an adapter or LoRA, `expert`.
      encoder_input_tokens: int32 [B, T], 0 is padding; a NumPy array is cut to its longest input.
      max_decode_len: most tokens to decode.
      eos_id: the end-of-sequence token.

    Returns:
      int32 [B, max_decode_len]; the end-of-sequence token is kept, 0 follows it.

    Raises:
      ElmError: as `generate`.
    """
    config = GenerationConfig(max_new_tokens=max_decode_len, eos_id=eos_id)
    return generate(model, variables, encoder_input_tokens, config).tokens[:, 0]
