"""Measures training steps on an accelerator or a CPU; prints tokens/s, MFU and memory as JSON.

Each row is one size, one kind of expert and one number of experts stacked, in a process of its own,
so that peaks of memory are its own. What is timed is the program that training runs
(`build_program`), with random weights in the dtype in which they would be loaded and random tokens
without padding. FLOPs are those of `elm-jax plan`: the model's, not what `remat` computes again.
What does not fit is a row with an error. The XLA_FLAGS and XLA_PYTHON_CLIENT_MEM_FRACTION that were
set are part of the report, so that two runs tell what a flag gains.

Example:
  python benchmarks/accelerator.py --sizes base large xl --kinds adapter lora --stacks 1 4 8 \\
    --scan-layers --remat minimal --batch-size 32 --inputs-length 512 --targets-length 128
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout that is not installed

if TYPE_CHECKING:
    import jax

    from elm_jax.training.planning import Device, Workload
    from elm_jax.training.program import Program
    from elm_jax.training.sharding import LogicalRules

KINDS = {
    "H200": "h200", "H100 80GB HBM3": "h100", "A100-SXM4-40GB": "a100-40gb", "A100-SXM4": "a100",
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
}  # fmt: skip
"""What JAX calls devices whose peak is known; for others it is told with --device."""
ROUNDS = 3


def find_device(name: str | None, device: jax.Device, dtype: str) -> Device | None:
    """Returns the peaks of a device, measured on a CPU, or None where they are not known."""
    from elm_jax.training.planning import get_device

    if name is None:
        known = [short for kind, short in KINDS.items() if kind in device.device_kind]
        name = "cpu" if device.platform == "cpu" else next(iter(known), None)
    return None if name is None else get_device(name, dtype)


def random_backbone(work: Workload, program: Program) -> Any:
    """Makes the frozen weights where they belong, as no host could hold the large ones twice."""
    import jax
    import jax.numpy as jnp

    from elm_jax.experts.tree import flatten, unflatten
    from elm_jax.training.planning import stored_backbone

    shapes = flatten(stored_backbone(work))

    def make(key: jax.Array) -> Any:
        made = {}
        for (path, leaf), one in zip(
            shapes.items(), jax.random.split(key, len(shapes)), strict=True
        ):
            if leaf.dtype == jnp.int8:
                made[path] = jax.random.randint(one, leaf.shape, -127, 128, jnp.int8)
            elif path.endswith("scale"):
                made[path] = jnp.full(leaf.shape, 1.0 if path.endswith("/scale") else 1e-4)
            else:
                made[path] = 0.02 * jax.random.normal(one, leaf.shape, leaf.dtype)
            made[path] = made[path].astype(leaf.dtype)
        return unflatten(made)

    return jax.jit(make, out_shardings=program.backbone)(jax.random.key(0))


def random_batch(work: Workload) -> dict[str, Any]:
    """Draws a stacked batch of tokens without padding."""
    import numpy as np

    rng = np.random.default_rng(0)

    def draw(length: int) -> Any:
        shape = (work.experts_per_step, work.batch_size, length)
        return rng.integers(2, work.config.vocab_size, shape).astype(np.int32)

    targets = draw(work.targets_length)
    return {
        "encoder_input_tokens": draw(work.inputs_length),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (0, 0), (1, 0)))[..., :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": np.ones_like(targets),
    }


def measure(
    work: Workload, mesh: jax.sharding.Mesh, rules: LogicalRules, name: str | None, steps: int
) -> dict[str, Any]:
    """Compiles and times the step of one stack of experts."""
    import jax

    from elm_jax.training.planning import plan_layout, step_flops
    from elm_jax.training.program import build_program, runs_one_by_one

    program = build_program(
        work.config, work.spec, work.experts_per_step, mesh, optimizer=work.optimizer,
        accumulation=work.accumulation, one_by_one=runs_one_by_one(mesh, rules), rules=rules,
    )  # fmt: skip
    backbone = random_backbone(work, program)
    keys = jax.device_put(jax.random.split(jax.random.key(1), work.experts_per_step), program.keys)
    batch = jax.device_put(random_batch(work), program.batch)
    state = program.jit_initial_state()(keys)
    begun = time.perf_counter()
    step = program.jit_step().lower(state, backbone, keys, batch).compile()
    compile_s = time.perf_counter() - begun
    seconds = []
    for number in range(ROUNDS + 1):  # the first only warms up
        jax.block_until_ready(state)
        begun = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, backbone, keys, batch)
        jax.block_until_ready(state)
        if number:
            seconds.append((time.perf_counter() - begun) / steps)
    loss = float(metrics["loss"].mean())
    if not math.isfinite(loss):
        raise SystemExit(f"the loss is {loss}")
    step_s = statistics.median(seconds)
    flops = step_flops(work) * work.experts_per_step
    first = mesh.devices.flat[0]
    device = find_device(name, first, work.config.dtype)
    stats = first.memory_stats() or {}
    planned, analysis = plan_layout(work, mesh, rules), step.memory_analysis()
    return {
        "step_s": step_s,
        "step_s_by_round": seconds,
        "tokens_per_s": work.tokens * work.experts_per_step / step_s,
        "step_flops": flops,
        "tflops_per_s_per_device": flops / step_s / mesh.size / 1e12,
        "mfu": None if device is None else flops / (step_s * mesh.size * device.flops),
        "peak": None if device is None else {"flops": device.flops, "source": device.source},
        "compile_s": compile_s,
        "loss": loss,
        "memory": {
            "peak_bytes": stats.get("peak_bytes_in_use"),  # None on a CPU
            "limit_bytes": stats.get("bytes_limit"),
            "planned_bytes": planned.total,
            "planned": planned.device_bytes(),
            "xla_argument_bytes": analysis.argument_size_in_bytes,
            "xla_temporary_bytes": analysis.temp_size_in_bytes,
            "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            * (1 if sys.platform == "darwin" else 1024),
        },
        "mesh": dict(mesh.shape),
        "device": first.device_kind,
    }


def make_parser() -> argparse.ArgumentParser:
    """Returns the arguments, those of `elm-jax plan` among them."""
    from elm_jax.cli import workload

    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        epilog="--backbone, --expert and --stack give way to --sizes, --kinds and --stacks.",
    )
    rows = parser.add_argument_group("rows, one for each combination")
    rows.add_argument("--sizes", nargs="+", default=["base"], metavar="NAME")
    rows.add_argument("--kinds", nargs="+", default=["adapter", "lora"], metavar="KIND")
    rows.add_argument("--stacks", type=int, nargs="+", default=[1], metavar="X")
    workload.add_arguments(parser, stack=1)
    parser.add_argument("--device", help="whose peak MFU is of, as for elm-jax plan (found by JAX)")
    parser.add_argument("--steps", type=int, default=10, help="timed in each round (%(default)s)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def work_on(args: argparse.Namespace) -> dict[str, Any]:
    """Measures one row in this process."""
    from elm_jax.cli import workload
    from elm_jax.training.sharding import MeshSpec, make_mesh, parse_rule

    spec = MeshSpec.parse(args.mesh, dict(map(parse_rule, args.rule)))
    work = workload.read_workload(args)
    row = measure(work, make_mesh(spec), spec.logical_rules(), args.device, args.steps)
    how = ("dtype", "remat", "attention", "scan_layers", "quantization")
    return row | {name: getattr(work.config, name) for name in how}


def run(size: str, kind: str, stack: int) -> dict[str, Any]:
    """Measures one row in a process of its own."""
    one = ["--worker", "--backbone", size, "--expert", kind, "--stack", str(stack)]
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], *one], capture_output=True, text=True, check=False
    )
    row = {"size": size, "expert": kind, "stack": stack}
    if done.returncode:
        said = done.stderr.strip().splitlines() or [""]
        return row | {"error": said[-1][:500], "exit_status": done.returncode}
    return row | json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints the measurements, or (with --worker) those of one row."""
    args = make_parser().parse_args()
    if args.worker:
        print(json.dumps(work_on(args)))
        return
    names = ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")
    report: dict[str, Any] = {
        "batch": args.batch_size,
        "inputs": args.inputs_length,
        "targets": args.targets_length,
        "steps": args.steps,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "environment": {name: os.environ[name] for name in names if name in os.environ},
        "rows": [],
    }
    for size, kind, stack in itertools.product(args.sizes, args.kinds, args.stacks):
        print(f"{size}, {kind}, {stack} stacked", file=sys.stderr)
        report["rows"].append(run(size, kind, stack))
    print(json.dumps(report, indent=2))
    if any("error" in row for row in report["rows"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
