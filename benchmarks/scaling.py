"""Measures what sharding costs on a fixed machine, and what XLA puts in for it; prints JSON.

The same step (one expert or a stack of two, AdamW, random weights and tokens without padding) on 1,
2, 4 and 8 devices that one CPU is made to look like, under each preset. The work stays the same, so
tokens/s against one device is the overhead of sharding alone; nothing here gets faster. From each
compiled program: FLOPs and bytes of a device as XLA reports them, what it sets aside, and its
collectives, each instruction counted once.
Each number of devices runs in a process of its own.

Example:
  python benchmarks/scaling.py --size tiny --devices 1 2 4 8
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "vocab": 1024, "dim": 64, "heads": 8, "head_dim": 16, "mlp": 128, "layers": 2,
        "batch": 16, "inputs": 64, "targets": 16,
    },
    "small": {
        "vocab": 32_128, "dim": 512, "heads": 8, "head_dim": 64, "mlp": 1024, "layers": 4,
        "batch": 8, "inputs": 128, "targets": 32,
    },
}  # fmt: skip
EXPERTS = 2
PRESETS = {
    "data_parallel": "data_parallel={n}",
    "fsdp": "fsdp={n},data=1",
    "tensor_parallel": "tensor_parallel={n},data=1",
    "expert_parallel": "expert_parallel=2,data={half}",
    "fsdp_tensor": "fsdp={half},tensor=2,data=1",
}
COLUMNS = ("flops", "bytes accessed")


def meshes(devices: int) -> dict[str, str]:
    """Returns the presets that so many devices allow."""
    if devices == 1:
        return {"single": "single"}
    texts = {k: v.format(n=devices, half=devices // 2) for k, v in PRESETS.items()}
    if devices == 2:  # the products are no others than the presets
        del texts["fsdp_tensor"]
    return texts


def measure(size: dict[str, int], mesh: str, steps: int) -> dict[str, Any]:
    """Compiles and times the step of training on a mesh of this process's devices."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from elm_jax.checkpoints import initialize
    from elm_jax.models import T5Config, get_spec
    from elm_jax.training import MeshSpec, make_mesh
    from elm_jax.training.hlo import count_collectives
    from elm_jax.training.program import build_program, runs_one_by_one

    config = T5Config(
        size["vocab"], size["dim"], size["heads"], size["head_dim"], size["mlp"], size["layers"],
        size["layers"],
    )  # fmt: skip
    place = make_mesh(MeshSpec.parse(mesh))
    program = build_program(
        config, get_spec("lora"), EXPERTS, place, one_by_one=runs_one_by_one(place)
    )
    backbone = jax.device_put(initialize(config, 0).params, program.backbone)
    keys = jax.random.split(jax.random.key(0), EXPERTS)
    rng = np.random.default_rng(0)

    def tokens(length: int) -> jax.Array:
        return rng.integers(2, size["vocab"], (EXPERTS, size["batch"], length)).astype(np.int32)

    inputs, targets = tokens(size["inputs"]), tokens(size["targets"])
    batch = {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (0, 0), (1, 0)))[..., :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": jnp.ones_like(targets),
    }
    batch = jax.device_put(batch, program.batch)
    keys = jax.device_put(keys, program.keys)
    state = program.jit_initial_state()(keys)
    begun = time.perf_counter()
    step = program.jit_step().lower(state, backbone, keys, batch).compile()
    compile_s = time.perf_counter() - begun
    seconds = []
    for number in range(steps + 1):
        begun = time.perf_counter()
        state, metrics = step(state, backbone, keys, batch)
        jax.block_until_ready(state)
        if number:
            seconds.append(time.perf_counter() - begun)
    count = EXPERTS * size["batch"] * (size["inputs"] + size["targets"])
    cost: Any = step.cost_analysis()
    memory: Any = step.memory_analysis()
    return {
        "mesh": mesh,
        "tokens_per_s": round(count / statistics.median(seconds), 1),
        "tokens_per_s_best": round(count / min(seconds), 1),
        "compile_s": round(compile_s, 2),
        "loss": round(float(metrics["loss"].mean()), 4),
        "device": {
            **{name.split()[0]: float(cost[name]) for name in COLUMNS},
            "argument_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
        },
        "collectives": count_collectives(step.as_text()),
    }


def run(size: str, devices: int, steps: int) -> dict[str, Any]:
    """Measures in a process with so many devices."""
    root = Path(__file__).resolve().parents[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, __file__, "--worker", str(devices), "--size", size]
    done = subprocess.run(
        [*command, "--steps", str(steps)],
        env=environment, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{devices} devices failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints the measurements, or (with --worker) those of one number of devices."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--steps", type=int, default=10, help="timed steps (%(default)s)")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for number in args.devices:
        if number < 1 or number & (number - 1) or number > 8:
            parser.error(f"--devices: {number} is not 1, 2, 4 or 8")
    if args.worker:
        table = {
            name: measure(SIZES[args.size], mesh, args.steps)
            for name, mesh in meshes(args.worker).items()
        }
        print(json.dumps(table))
        return
    report: dict[str, Any] = {
        "size": args.size,
        **SIZES[args.size],
        "experts": EXPERTS,
        "steps": args.steps,
        "processors": os.cpu_count(),
        "machine": platform.machine(),
        "load_average": [round(os.getloadavg()[0], 1)],
        "results": {},
    }
    for number in args.devices:
        print(f"{number} devices", file=sys.stderr)
        report["results"][number] = run(args.size, number, args.steps)
    report["load_average"].append(round(os.getloadavg()[0], 1))
    alone = report["results"].get(1, {}).get("single")
    if alone is not None:
        for table in report["results"].values():
            for row in table.values():
                ratio = row["tokens_per_s"] / alone["tokens_per_s"]
                row["speed_to_one_device"] = round(ratio, 3)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
