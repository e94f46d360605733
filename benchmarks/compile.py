"""Measures how long the training step of a T5 takes to compile, and prints JSON.

The step is that of elm_jax.training for one LoRA or adapter expert (AdamW, bfloat16, dropout 0.1).
Only shapes are traced: no weights are made, so any size compiles on any machine. Each way of
running a backbone is measured in a process of its own, without a compilation cache:
  one_by_one  every layer compiled, as by default;
  scanned     `scan_layers`: one encoder and one decoder layer compiled;
  scanned_minimal, scanned_full  with `remat`, too.
`temporary_gb` is what XLA plans for activations and scratch on this backend.

Example:
  python benchmarks/compile.py --size t5_1_1_base t5_1_1_xl --ways scanned scanned_minimal
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

WAYS: dict[str, dict[str, Any]] = {
    "one_by_one": {},
    "scanned": {"scan_layers": True},
    "scanned_minimal": {"scan_layers": True, "remat": "minimal"},
    "scanned_full": {"scan_layers": True, "remat": "full"},
}


def work(size: str, way: str, expert: str, batch: int, inputs: int, targets: int) -> dict[str, Any]:
    """Lowers and compiles one training step in this process."""
    import jax
    import jax.numpy as jnp

    from elm_jax.experts.apply import backbone_shapes, expert_shapes
    from elm_jax.experts.tree import count_parameters
    from elm_jax.models import T5, get_spec
    from elm_jax.models.sizes import get_config
    from elm_jax.training import OptimizerSpec, TrainState, make_optimizer, make_train_step

    config = get_config(size, dtype="bfloat16", **WAYS[way])
    spec, optimizer = get_spec(expert), make_optimizer(OptimizerSpec(), train_steps=1)
    start = time.perf_counter()
    backbone = backbone_shapes(config)
    shapes = expert_shapes(config, spec)
    traced = time.perf_counter() - start

    def stacked(tree: Any) -> Any:
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct((1, *s.shape), s.dtype), tree)

    half = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16), backbone)
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32),  # type: ignore[arg-type]
        stacked(shapes),
        stacked(jax.eval_shape(optimizer.init, shapes)),
    )
    lengths = {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": targets,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": targets,
    }
    rows = {k: jax.ShapeDtypeStruct((1, batch, n), jnp.int32) for k, n in lengths.items()}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    step = jax.jit(make_train_step(T5(config, spec), spec, optimizer), donate_argnums=0)
    start = time.perf_counter()
    lowered = step.lower(state, half, keys, rows)
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "parameters": count_parameters(backbone),
        "shapes_s": round(traced, 2),
        "lower_s": round(middle - start, 2),
        "compile_s": round(end - middle, 2),
        "total_s": round(end - start, 2),
        "temporary_gb": round(compiled.memory_analysis().temp_size_in_bytes / 2**30, 3),
        "compiler_memory_mb": round(memory / 2**20, 1),
        "device": jax.devices()[0].device_kind,
    }


def main() -> None:
    """Prints the measurements, or (with --worker) one of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", nargs="+", default=["t5_1_1_base"], help="names of models.sizes")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["one_by_one", "scanned"])
    parser.add_argument("--expert", default="lora")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=512, help="tokens of an input")
    parser.add_argument("--targets", type=int, default=64, help="tokens of a target")
    parser.add_argument("--worker", nargs=2, metavar=("SIZE", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = (args.expert, args.batch, args.inputs, args.targets)
    if args.worker:
        print(json.dumps(work(*args.worker, *shape)))
        return
    root = Path(__file__).resolve().parents[1]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    results: dict[str, dict[str, Any]] = {}
    for size in args.size:
        for way in args.ways:
            print(f"{size}: {way}", file=sys.stderr)
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--worker", size, way],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            if done.returncode:
                sys.exit(f"{size} {way} failed, see above")
            results.setdefault(size, {})[way] = json.loads(done.stdout.splitlines()[-1])
    report = {
        "expert": args.expert,
        "batch": args.batch,
        "inputs": args.inputs,
        "targets": args.targets,
        "dtype": "bfloat16",
        "processors": os.cpu_count(),
        "machine": platform.machine(),
        "load_average": round(os.getloadavg()[0], 1),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "results": results,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
