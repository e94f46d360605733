"""Optimizers as frozen specs, built on optax."""

from __future__ import annotations

import dataclasses
import math

import optax

from elm_jax.errors import ElmError, nearest

NAMES = ("adamw", "adafactor")
SCHEDULES = ("constant", "linear")


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer, its schedule and its clipping; all of it acts on each expert by itself.

    Attributes:
      name: 'adamw', or 'adafactor' (factored, without momentum, relative step or parameter scale).
      learning_rate: peak learning rate.
      schedule: 'constant', or 'linear' decay to zero at the last step.
      warmup_steps: steps of linear warm-up from zero before the schedule.
      weight_decay: decoupled weight decay.
      clip_norm: the largest global norm of an expert's gradient; None does not clip.
      b1: AdamW's decay of the first moment.
      b2: AdamW's decay of the second moment.
      eps: AdamW's epsilon.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for field, accepted in (("name", NAMES), ("schedule", SCHEDULES)):
            value = getattr(self, field)
            if value not in accepted:
                raise ElmError(
                    f"optimizer {field} {value!r} is unknown{nearest(str(value), accepted)}; "
                    f"accepted: {', '.join(accepted)}"
                )
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ElmError(f"learning_rate must be positive, got {self.learning_rate!r}")
        for field in ("warmup_steps", "weight_decay"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ElmError(
                    f"{field} must not be negative nor infinite, got {getattr(self, field)}"
                )
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ElmError(f"clip_norm must be positive or None, got {self.clip_norm!r}")


def learning_rate_schedule(spec: OptimizerSpec, train_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    >>> schedule = learning_rate_schedule(OptimizerSpec(learning_rate=1.0, schedule='linear'), 4)
    >>> [float(schedule(step)) for step in range(5)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    rest = max(train_steps - spec.warmup_steps, 1)
    if spec.schedule == "linear":
        main = optax.linear_schedule(spec.learning_rate, 0.0, rest)
    else:
        main = optax.constant_schedule(spec.learning_rate)
    if not spec.warmup_steps:
        return main
    warmup = optax.linear_schedule(0.0, spec.learning_rate, spec.warmup_steps)
    return optax.join_schedules([warmup, main], [spec.warmup_steps])


def make_optimizer(spec: OptimizerSpec, train_steps: int) -> optax.GradientTransformation:
    """Builds the optax transformation of one expert (the training step maps it over the stack)."""
    schedule = learning_rate_schedule(spec, train_steps)
    if spec.name == "adamw":
        core = optax.adamw(schedule, spec.b1, spec.b2, spec.eps, weight_decay=spec.weight_decay)
    else:
        core = optax.adafactor(
            schedule,
            multiply_by_parameter_scale=False,
            weight_decay_rate=spec.weight_decay or None,
        )
    if spec.clip_norm is None:
        return core
    return optax.chain(optax.clip_by_global_norm(spec.clip_norm), core)
