"""Says where the time of an expert's training step goes, from a profile of XLA's operations; JSON.

The step is `train_step.py`'s. Each operation that XLA's profiler saw is put to the part of the
model that it was compiled from; the time is that of all threads together. `limit_ms` is how long
the step's FLOPs would take at the rate of one large product on the same machine, in the same
process.

Example:
  python benchmarks/profile_step.py --size tiny --kind lora
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from train_step import SIZES, jax_program, threads

PARTS = {
    "dropout": r"dropout|random|threefry|bernoulli|_uniform|bits",
    "logits and loss": r"logits|log_softmax|cross_entropy|loss|argmax|reduce_max|token_embedder",
    "attention": r"attention",
    "feed-forward": r"mlp",
    "layer norm": r"layer_norm|/norm",
    "optimizer": r"adam|clip|optim|global_norm",
}
"""Part -> what an operation's name in the program holds; the first that fits counts."""
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*?op_name=\"([^\"]*)\"", re.MULTILINE)
CALLS = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*? fusion\(.*?calls=%?([\w.-]+)", re.MULTILINE)
COMPUTATION = re.compile(r"^%?([\w.-]+) \(.*?^}", re.MULTILINE | re.DOTALL)
PRODUCT = re.compile(r" (?:dot|convolution)\(")


def part_of(name: str) -> str:
    """Returns the part of the model that an operation's name speaks of."""
    path = name.split("/", 2)[-1]
    return next((part for part, pattern in PARTS.items() if re.search(pattern, path)), "other")


def operations(text: str) -> dict[str, tuple[str, str]]:
    """Maps the instructions of a compiled program to (part, kind)."""
    products = {m[1] for m in COMPUTATION.finditer(text) if PRODUCT.search(m[0])}
    fusions = {m[1] for m in CALLS.finditer(text) if m[2] in products}
    direct = re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = \S+ dot\(", text, re.MULTILINE)
    fusions.update(direct)
    found = {}
    for instruction, name in INSTRUCTION.findall(text):
        if instruction.startswith(("while", "call", "conditional")):
            continue  # their own time is that of the operations within
        product = instruction in fusions
        found[instruction] = (part_of(name), "products" if product else "other operations")
    return found


def matmul_rate(repeats: int = 10) -> float:
    """Returns FLOP/s of a float32 product of 1,024 x 1,024 matrices, the median of repeats."""
    import jax
    import jax.numpy as jnp

    matrix = jnp.ones((1024, 1024))
    product = jax.jit(jnp.dot)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * 1024**3 / statistics.median(seconds)


def profile(name: str, size: dict[str, int], steps: int) -> dict[str, Any]:
    """Runs and profiles `steps` steps of a contender of `train_step.py`."""
    import jax
    from jax.profiler import ProfileData

    program, state, rest = jax_program(name, size)
    known = operations(program.as_text())
    seconds = []
    for _ in range(3 + steps):
        start = time.perf_counter()
        state, _ = program(state, *rest)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - start)
    undisturbed = statistics.median(seconds[3:])
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                state, _ = program(state, *rest)
                jax.block_until_ready(state)
        [path] = Path(folder).rglob("*.xplane.pb")
        events = [
            (event.name, event.duration_ns)
            for plane in ProfileData.from_file(str(path)).planes
            for line in plane.lines
            for event in line.events
        ]
    spent: Counter[tuple[str, str]] = Counter()
    durations = []
    for instruction, nanoseconds in events:
        if instruction in known:
            spent[known[instruction]] += nanoseconds
            durations.append(nanoseconds)
    total = sum(spent.values())
    if not total:
        sys.exit("the profile holds no operation of the program")
    rate = matmul_rate()
    flops = program.cost_analysis()["flops"]
    by_part: Counter[str] = Counter()
    by_kind: Counter[str] = Counter()
    for (part, kind), nanoseconds in spent.items():
        by_part[part] += nanoseconds
        by_kind[kind] += nanoseconds
    return {
        "step_ms": undisturbed * 1e3,
        "operations_ms": total / steps / 1e6,
        "operations": len(durations) // steps,
        "median_operation_us": statistics.median(durations) / 1e3,
        "share_by_part": {k: round(v / total, 3) for k, v in by_part.most_common()},
        "share_by_kind": {k: round(v / total, 3) for k, v in by_kind.most_common()},
        "gflops": flops / 1e9,
        "matmul_gflops_per_s": rate / 1e9,
        "limit_ms": flops / rate * 1e3,
        "limit_to_step": flops / rate / undisturbed,
    }


def main() -> None:
    """Prints the profile."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--kind", choices=("lora", "adapter"), default="lora")
    parser.add_argument("--per-element", action="store_true", help="a dropout mask per element")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    name = f"ours_{args.kind}" + ("_per_element" if args.per_element else "")
    report = {
        "size": args.size,
        "contender": name,
        "threads": threads(),
        "load_average": round(os.getloadavg()[0], 1),
        **profile(name, SIZES[args.size], args.steps),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
