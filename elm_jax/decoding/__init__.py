"""From a model and its input to an answer: ranked choices or generated tokens.

`rank` stays in `elm_jax.decoding.rank`, whose name it would hide here.
"""

from elm_jax.decoding.config import DECODINGS, GenerationConfig, get_decoding
from elm_jax.decoding.generation import generate, stacked_generate
from elm_jax.decoding.greedy import greedy_decode
from elm_jax.decoding.mixed import (
    mixed_choice_log_probs,
    mixed_generate,
    mixed_log_likelihood,
)
from elm_jax.decoding.rank import (
    ChoiceTree,
    choice_lengths,
    choice_log_probs,
    pack_choices,
    stacked_choice_log_probs,
    tree_log_probs,
)
from elm_jax.decoding.search import Generated

__all__ = [
    "DECODINGS",
    "ChoiceTree",
    "Generated",
    "GenerationConfig",
    "choice_lengths",
    "choice_log_probs",
    "generate",
    "get_decoding",
    "greedy_decode",
    "mixed_choice_log_probs",
    "mixed_generate",
    "mixed_log_likelihood",
    "pack_choices",
    "stacked_choice_log_probs",
    "stacked_generate",
    "tree_log_probs",
]
