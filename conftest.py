"""Keeps the search for doctests out of what is no test, or cannot be imported here."""

from importlib.util import find_spec

from elm_jax import t5x

_NEED_T5X = ("checkpoints", "models", "optimizers")
collect_ignore = [
    "elm_jax/data/p3/registered.py",  # registers tasks when imported
    "tests/checkpoints/fuzz.py",
    "tests/experts/fuzz.py",
    "tests/experts/adapters_reference.py",  # runs in a Python of its own
]
collect_ignore += [] if t5x.is_available() else [f"elm_jax/t5x/{name}.py" for name in _NEED_T5X]
collect_ignore += [] if find_spec("seqio") else ["elm_jax/t5x/tasks.py"]
