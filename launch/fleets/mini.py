"""A fleet on the embedded suite: an expert for each task, one for each prompt, one for all.

  elm-jax fleet run launch/fleets/mini.py --set store=store --set defaults.train_steps=50
Takes minutes on two CPU cores.
"""

from __future__ import annotations

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the list of runs."""
    return ml_collections.ConfigDict(
        {
            "backbone": "elm-tiny",
            "store": "store",
            "defaults": {
                "expert": "adapter",
                "train_steps": 100,
                "batch_size": 16,
                "experts_per_step": 5,
                "optimizer": {"learning_rate": 3e-3, "schedule": "linear"},
            },
            "runs": (
                {"name": "tasks", "tasks": ("mini:train",)},
                {"name": "prompts", "tasks": ("mini:train",), "per": "prompt"},
                {
                    "name": "multitask",
                    "tasks": ("mini:train",),
                    "multitask": "multitask",
                    "train_steps": 500,
                    "batch_size": 64,
                },
            ),
        }
    )
