"""Checks `elm-jax plan` against a measured run on this machine's processors, and prints JSON.

The rate of large float32 products and of a copy is measured first, and after; the plan is made with
the mean of both and a utilisation of 1. Then `train_stack`, the loop of every run, trains an expert
on random tokens without padding, and the time of its steps (medians of its own records; start and
compilation left out) is compared. `factor` is measured over planned seconds, and its reciprocal the
utilisation with which the plan would have been right.

Example:
  python benchmarks/plan_check.py --sizes tiny small
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from elm_jax.checkpoints import initialize
from elm_jax.models import T5Config, get_spec
from elm_jax.training import Member, MeshSpec, RunConfig, make_mesh, train_stack
from elm_jax.training.metrics import read_metrics
from elm_jax.training.planning import Device, Fleet, Workload, measure_cpu, plan_fleet
from elm_jax.training.sharding import abstract_mesh

SIZES: dict[str, tuple[T5Config, dict[str, int]]] = {
    "tiny": (T5Config(1000, 64, 4, 16, 128, 2, 2), {"batch": 32, "inputs": 64, "targets": 16}),
    "medium": (T5Config(8000, 256, 4, 64, 512, 4, 4), {"batch": 8, "inputs": 128, "targets": 32}),
    "small": (
        T5Config(32_128, 512, 6, 64, 1024, 8, 8), {"batch": 8, "inputs": 128, "targets": 32},
    ),
}  # fmt: skip


class RandomTokens:
    """Batches of random tokens, each a pure function of the step."""

    def __init__(self, config: T5Config, shape: Mapping[str, int]) -> None:
        self.config, self.shape = config, shape

    def batch_at(self, step: int) -> Mapping[str, np.ndarray]:
        rng = np.random.default_rng(step)

        def draw(length: int) -> np.ndarray:
            shape = (self.shape["batch"], length)
            return rng.integers(2, self.config.vocab_size, shape).astype(np.int32)

        targets = draw(self.shape["targets"])
        return {
            "encoder_input_tokens": draw(self.shape["inputs"]),
            "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": targets,
            "decoder_loss_weights": np.ones_like(targets),
        }

    def state(self) -> Mapping[str, Any]:
        return {}


def train(config: T5Config, shape: Mapping[str, int], kind: str, steps: int) -> float:
    """Returns the seconds of a step of training, by the run's own records."""
    params = initialize(config, seed=0).params
    run = RunConfig(train_steps=steps + 1, log_every=1, checkpoint_every=steps + 1)
    with tempfile.TemporaryDirectory() as folder:
        train_stack(
            config, params, get_spec(kind), [Member("one", RandomTokens(config, shape))], run,
            folder=folder, mesh=make_mesh(MeshSpec.parse("single")),
        )  # fmt: skip
        records = read_metrics(f"{folder}/metrics.jsonl")[1:]
    tokens = shape["batch"] * (shape["inputs"] + shape["targets"])
    return statistics.median(tokens / record["tokens_per_second"] for record in records)


def check(name: str, kind: str, steps: int) -> dict[str, Any]:
    """Compares one size."""
    config, shape = SIZES[name]
    before = measure_cpu("float32")
    seconds = train(config, shape, kind, steps)
    after = measure_cpu("float32")
    device = Device(
        "cpu",
        (before.flops + after.flops) / 2,
        before.memory,
        (before.bandwidth + after.bandwidth) / 2,
        "measured",
    )
    work = Workload(
        config,
        get_spec(kind),
        batch_size=shape["batch"],
        inputs_length=shape["inputs"],
        targets_length=shape["targets"],
    )
    plan = plan_fleet(
        work, Fleet(), abstract_mesh(MeshSpec.parse("single")), device, utilisation=1.0
    )
    return {
        "products_gflops_per_s": [round(d.flops / 1e9, 1) for d in (before, after)],
        "copy_gb_per_s": [round(d.bandwidth / 1e9, 1) for d in (before, after)],
        "step_gflops": round(plan.step_flops / 1e9, 3),
        "bound": plan.bound,
        "planned_s": round(plan.seconds_per_step, 4),
        "measured_s": round(seconds, 4),
        "factor": round(seconds / plan.seconds_per_step, 2),
        "utilisation": round(plan.step_flops / (device.flops * seconds), 3),
    }


def main() -> None:
    """Prints the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "medium", "small"])
    parser.add_argument("--expert", default="adapter")
    parser.add_argument("--steps", type=int, default=8, help="timed steps (%(default)s)")
    args = parser.parse_args()
    report: dict[str, Any] = {
        "expert": args.expert,
        "steps": args.steps,
        "processors": os.cpu_count(),
        "load_average": [round(os.getloadavg()[0], 1)],
    }
    report["results"] = {name: check(name, args.expert, args.steps) for name in args.sizes}
    report["load_average"].append(round(os.getloadavg()[0], 1))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
