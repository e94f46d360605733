"""P3, the 36 training datasets and 11 evaluation datasets of T0 and ELM, as tasks."""

from elm_jax.data.p3.catalog import (
    Catalog,
    P3Dataset,
    P3Prompt,
    Recipe,
    catalog,
    t0_rates,
)
from elm_jax.data.p3.sources import (
    Counts,
    P3Source,
    find_p3,
    published_config,
    read_examples,
    task_data,
)

__all__ = [
    "Catalog",
    "Counts",
    "P3Dataset",
    "P3Prompt",
    "P3Source",
    "Recipe",
    "catalog",
    "find_p3",
    "published_config",
    "read_examples",
    "t0_rates",
    "task_data",
]
