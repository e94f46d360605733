"""From a model and its input to an answer: ranked choices or generated tokens.

`rank` stays in `elm_jax.decoding.rank`, whose name it would hide here.
"""

from elm_jax.decoding.greedy import greedy_decode, stacked_greedy_decode
from elm_jax.decoding.rank import (
    ChoiceTree,
    choice_lengths,
    choice_log_probs,
    pack_choices,
    stacked_choice_log_probs,
    tree_log_probs,
)

__all__ = [
    "ChoiceTree",
    "choice_lengths",
    "choice_log_probs",
    "greedy_decode",
    "pack_choices",
    "stacked_choice_log_probs",
    "stacked_greedy_decode",
    "tree_log_probs",
]
