"""Keeps the doctests out of modules that import t5x, which is optional, where it is missing."""

from elm_jax import t5x

_NEED_T5X = ("checkpoints", "models", "optimizers")
collect_ignore = [] if t5x.is_available() else [f"elm_jax/t5x/{name}.py" for name in _NEED_T5X]
