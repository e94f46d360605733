"""Optimizers against optax, their schedules and what they refuse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from elm_jax.errors import ElmError
from elm_jax.training import OptimizerSpec, make_optimizer
from elm_jax.training.optimizers import learning_rate_schedule

PARAMS = {"w": jnp.linspace(-1, 1, 300).reshape(150, 2), "b": jnp.ones(3)}
GRADS = jax.tree.map(lambda x: 10 * x + 1, PARAMS)


def updates(optimizer: optax.GradientTransformation, steps: int = 3) -> dict:
    state, params = optimizer.init(PARAMS), PARAMS
    for _ in range(steps):
        change, state = optimizer.update(GRADS, state, params)
        params = optax.apply_updates(params, change)
    return params


def test_adamw_is_optax_adamw() -> None:
    spec = OptimizerSpec(learning_rate=0.1, weight_decay=0.01, clip_norm=0.5, b1=0.8, b2=0.95)
    by_hand = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(0.1, b1=0.8, b2=0.95, weight_decay=0.01)
    )
    for one, other in zip(
        jax.tree.leaves(updates(make_optimizer(spec, 3))),
        jax.tree.leaves(updates(by_hand)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_adafactor_keeps_factored_moments() -> None:
    big = {"w": jnp.ones((256, 384))}
    state = make_optimizer(OptimizerSpec(name="adafactor"), 3).init(big)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 2000
    moved = updates(make_optimizer(OptimizerSpec(name="adafactor", learning_rate=0.1), 3))
    assert not np.allclose(moved["w"], PARAMS["w"]) and np.isfinite(moved["w"]).all()


def test_weight_decay_only_where_asked() -> None:
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    for name in ("adamw", "adafactor"):
        for decay in (0.0, 0.5):
            optimizer = make_optimizer(OptimizerSpec(name=name, weight_decay=decay), 3)
            change, _ = optimizer.update(zero, optimizer.init(PARAMS), PARAMS)
            assert bool(np.any(change["w"])) == bool(decay), (name, decay)


def test_schedules() -> None:
    def rates(steps: int, **fields: object) -> list[float]:
        schedule = learning_rate_schedule(OptimizerSpec(learning_rate=1.0, **fields), steps)
        return [round(float(schedule(step)), 4) for step in range(steps)]

    assert rates(3) == [1, 1, 1]
    assert rates(4, warmup_steps=2) == [0, 0.5, 1, 1]
    assert rates(6, warmup_steps=2, schedule="linear") == [0, 0.5, 1, 0.75, 0.5, 0.25]
    assert rates(2, warmup_steps=4, schedule="linear") == [0, 0.25]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adamv"}, "optimizer name 'adamv' is unknown.*did you mean 'adamw'"),
        ({"schedule": "liner"}, "schedule 'liner' is unknown.*did you mean 'linear'"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive, got nan"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"weight_decay": float("inf")}, "weight_decay must not be negative nor infinite, got inf"),
        ({"clip_norm": 0.0}, "clip_norm must be positive or None, got 0.0"),
        ({"clip_norm": float("inf")}, "clip_norm must be positive or None, got inf"),
    ],
)
def test_what_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ElmError, match=message):
        OptimizerSpec(**fields)
