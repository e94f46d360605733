"""Keeps the doctests out of modules whose optional packages are missing."""

from importlib.util import find_spec

from elm_jax import t5x

_NEED_T5X = ("checkpoints", "models", "optimizers")
collect_ignore = [] if t5x.is_available() else [f"elm_jax/t5x/{name}.py" for name in _NEED_T5X]
collect_ignore += [] if find_spec("seqio") else ["elm_jax/t5x/tasks.py"]
