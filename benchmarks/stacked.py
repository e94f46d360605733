"""Measures training X experts in one compiled step against one after another, and prints JSON.

The same work three ways, interleaved, in one process (random weights and tokens, no padding):
  alone: a step of one expert, X times;
  looped: one step of X experts, which it takes one by one (what training does on a CPU);
  batched: one step of X experts at once (what training does on an accelerator).
Speeds are of the steps alone, medians. `run_s` adds the start to --train-steps steps of every
expert: one import and one compilation, but for `alone_commands`, one expert a process, X of each.
These are sums of measured parts.

Example:
  python benchmarks/stacked.py --size tiny --stacks 1 2 4 8 16
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.checkpoints import Backbone, initialize
from elm_jax.experts import init_expert
from elm_jax.models import T5, T5Config, get_spec
from elm_jax.training import OptimizerSpec, TrainState, make_optimizer, make_train_step

SIZES = {
    "tiny": (T5Config(1000, 64, 4, 16, 128, 2, 2), {"batch": 32, "inputs": 64, "targets": 16}),
    "mini": (
        T5Config(32_128, 256, 4, 64, 512, 4, 4), {"batch": 8, "inputs": 64, "targets": 16},
    ),
    "small": (
        T5Config(32_128, 512, 6, 64, 1024, 8, 8), {"batch": 8, "inputs": 128, "targets": 32},
    ),
}  # fmt: skip


def import_seconds() -> float:
    """Returns the time in which a new process has imported what training needs."""
    begun = time.perf_counter()
    folder = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", "import elm_jax.training"], cwd=folder, check=True)
    return time.perf_counter() - begun


def start(
    backbone: Backbone, kind: str, count: int, size: dict[str, int], *, one_by_one: bool
) -> tuple[Callable[[int], None], int]:
    """Builds a step of `count` experts at once.

    Returns:
      A function that takes the step so many times, and the bytes needed beside its arguments.
    """
    config, spec = backbone.config, get_spec(kind)
    optimizer = make_optimizer(OptimizerSpec(), train_steps=1)
    keys = jax.random.split(jax.random.key(0), count)
    rng = np.random.default_rng(0)
    inputs, targets = (
        rng.integers(2, config.vocab_size, (count, size["batch"], size[name])).astype(np.int32)
        for name in ("inputs", "targets")
    )
    batch = {
        "encoder_input_tokens": jnp.asarray(inputs),
        "decoder_input_tokens": jnp.asarray(np.pad(targets, ((0, 0), (0, 0), (1, 0)))[..., :-1]),
        "decoder_target_tokens": jnp.asarray(targets),
        "decoder_loss_weights": jnp.ones_like(targets),
    }
    expert = jax.vmap(lambda key: init_expert(config, spec, key))(keys)
    state = TrainState(jnp.zeros((), jnp.int32), expert, jax.vmap(optimizer.init)(expert))
    step = jax.jit(
        make_train_step(T5(config, spec), spec, optimizer, one_by_one=one_by_one),
        donate_argnums=0,
    )
    compiled = step.lower(state, backbone.params, keys, batch).compile()
    memory = compiled.memory_analysis()

    def take(repeats: int) -> None:
        nonlocal state
        for _ in range(repeats):
            state, _ = compiled(state, backbone.params, keys, batch)
            jax.block_until_ready(state)

    return take, memory.temp_size_in_bytes if memory is not None else 0


def measure(
    backbone: Backbone,
    kind: str,
    count: int,
    size: dict[str, int],
    import_s: float,
    repeats: int,
    train_steps: int,
) -> dict[str, Any]:
    """Measures one kind of expert and one height of the stack."""
    ways = {"alone": (1, count, False), "looped": (count, 1, True), "batched": (count, 1, False)}
    compile_s, memory_mb, steps = {}, {}, {}
    for name, (together, times, one_by_one) in ways.items():
        begun = time.perf_counter()
        take, temporary = start(backbone, kind, together, size, one_by_one=one_by_one)
        take(1)
        compile_s[name] = time.perf_counter() - begun
        memory_mb[name] = round(temporary / 2**20, 1)
        steps[name] = (take, times)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, (take, times) in steps.items():
            begun = time.perf_counter()
            take(times)
            seconds[name].append(time.perf_counter() - begun)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    run_s = {name: import_s + compile_s[name] + train_steps * median[name] for name in ways}
    run_s["alone_commands"] = run_s["alone"] + (count - 1) * (import_s + compile_s["alone"])
    tokens = count * size["batch"] * (size["inputs"] + size["targets"])
    return {
        "kind": kind,
        "experts": count,
        "tokens_per_s": {name: round(tokens / t, 1) for name, t in median.items()},
        "tokens_per_s_best": {n: round(tokens / min(t), 1) for n, t in seconds.items()},
        "speed_to_alone": {n: round(median["alone"] / median[n], 3) for n in ("looped", "batched")},
        "compile_s": {name: round(t, 2) for name, t in compile_s.items()},
        "run_s": {name: round(t, 2) for name, t in run_s.items()},
        "run_speed_to_alone": {
            n: round(run_s["alone"] / run_s[n], 3) for n in ("looped", "batched")
        },
        "run_speed_to_alone_commands": {
            n: round(run_s["alone_commands"] / run_s[n], 3) for n in ("looped", "batched")
        },
        "temporary_mb": memory_mb,
    }


def main() -> None:
    """Prints the measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--kinds", nargs="+", default=["adapter", "lora"])
    parser.add_argument("--stacks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--batch", type=int, help="rows of a batch of one expert")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--train-steps", type=int, default=200, help="of an expert, for run_s")
    args = parser.parse_args()
    config, size = SIZES[args.size]
    size = size | ({"batch": args.batch} if args.batch else {})
    backbone = initialize(config, seed=0)
    import_s = statistics.median(import_seconds() for _ in range(3))
    processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    report: dict[str, Any] = {
        "size": args.size,
        **size,
        "threads": len(processors) or os.cpu_count(),
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "repeats": args.repeats,
        "train_steps": args.train_steps,
        "import_s": round(import_s, 2),
        "load_average": [round(os.getloadavg()[0], 1)],
        "results": [],
    }
    for kind in args.kinds:
        for count in args.stacks:
            print(f"{kind}, {count} experts", file=sys.stderr)
            report["results"].append(
                measure(backbone, kind, count, size, import_s, args.repeats, args.train_steps)
            )
    report["load_average"].append(round(os.getloadavg()[0], 1))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
