"""Measures loading a Hugging Face checkpoint against transformers, and prints JSON.

A random T5 1.1 base in float32 (0.99 GB, one safetensors file). Each contender runs in a process of
its own, they take turns, and each turn is a new process: imports and a first small load come before
the clock starts. The file is in the page cache (the first turn of each is not counted).
  ours: elm_jax.checkpoints.load_backbone, arrays on the default device; its time includes the
    fingerprint, for which every array is read and hashed;
  ours_bfloat16: the same, cast to bfloat16 as it is read;
  transformers: T5ForConditionalGeneration.from_pretrained in PyTorch;
  transformers_bfloat16: the same with dtype=bfloat16.
`load_s` is the call alone. `ready_s` is until every value was read once (a sum of each array), as
an implementation may map the file and read nothing before. `peak_mib` is the highest resident
memory above that before the load, pages of mapped files included, until ready; `held_mib` is the
size of the parameters.

Example:
  python benchmarks/load.py --size t5_1_1_base --repeats 5
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
from tempfile import TemporaryDirectory
from typing import Any

CONTENDERS = ("ours", "ours_bfloat16", "transformers", "transformers_bfloat16")


def write_checkpoint(folder: Path, size: str) -> Path:
    """Writes random weights of a published size, and of a tiny one to warm up with."""
    import jax
    import numpy as np

    from elm_jax.checkpoints import Backbone, save_huggingface
    from elm_jax.experts.apply import backbone_shapes
    from elm_jax.models.sizes import get_config

    config = get_config(size)
    rng = np.random.default_rng(0)
    for name, made in (
        ("large", config),
        ("little", config.replace(vocab_size=64, emb_dim=16, mlp_dim=16)),
    ):
        params = jax.tree.map(
            lambda s: rng.standard_normal(s.shape, np.float32) * np.float32(0.05),
            backbone_shapes(made),
        )
        save_huggingface(Backbone(name, made, params, ""), folder / name)
    return folder


def loader(contender: str) -> Callable[[Path], tuple[Callable[[], float], int]]:
    """Returns a function that loads a folder: (a function that reads all of it, its bytes)."""
    dtype = "bfloat16" if contender.endswith("_bfloat16") else None
    if contender.startswith("ours"):
        import jax
        import jax.numpy as jnp

        from elm_jax.checkpoints import load_backbone

        def ours(folder: Path) -> tuple[Callable[[], float], int]:
            params = jax.block_until_ready(load_backbone(folder, dtype=dtype).params)
            leaves = jax.tree.leaves(params)
            return lambda: float(sum(jnp.sum(x) for x in leaves)), sum(x.nbytes for x in leaves)

        return ours

    import torch
    from transformers import T5ForConditionalGeneration

    def theirs(folder: Path) -> tuple[Callable[[], float], int]:
        model = T5ForConditionalGeneration.from_pretrained(
            folder, dtype=torch.bfloat16 if dtype else torch.float32
        )
        parameters = list(model.parameters())
        with torch.inference_mode():
            return (
                lambda: float(sum(p.sum() for p in parameters)),
                sum(p.nbytes for p in parameters),
            )

    return theirs


def memory(key: str) -> int:
    """Returns a figure of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {key}")


def work(contender: str, folder: Path) -> None:
    """Loads once and prints what it took, as JSON."""
    load = loader(contender)
    load(folder / "little")[0]()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = memory("VmRSS")
    started = time.perf_counter()
    read, held = load(folder / "large")
    loaded = time.perf_counter() - started
    checksum = read()
    ready = time.perf_counter() - started
    peak = memory("VmHWM") - before
    facts = {"load_s": loaded, "ready_s": ready, "peak": peak, "held": held, "sum": checksum}
    print(json.dumps(facts))


def turn(contender: str, folder: Path) -> dict[str, float]:
    """Runs a contender in a new process."""
    command = [sys.executable, __file__, "--worker", contender, "--folder", str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{contender} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Prints the measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", default="t5_1_1_base")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.folder)
        return
    report: dict[str, Any] = {
        "size": args.size,
        "repeats": args.repeats,
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": [round(os.getloadavg()[0], 1)],
    }
    with TemporaryDirectory() as temporary:
        folder = write_checkpoint(Path(temporary), args.size)
        report["file_mib"] = round((folder / "large/model.safetensors").stat().st_size / 2**20)
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in args.contenders}
        for repeat in range(args.repeats + 1):
            print(f"  repeat {repeat} of {args.repeats}", file=sys.stderr)
            for name in args.contenders:
                turns[name].append(turn(name, folder))
    report["load_average"].append(round(os.getloadavg()[0], 1))
    report["results"] = {
        name: {
            **{key: round(statistics.median(t[key] for t in counted), 2)
               for key in ("load_s", "ready_s")},
            "ready_s_best": round(min(t["ready_s"] for t in counted), 2),
            "peak_mib": round(max(t["peak"] for t in counted) / 2**20),
            "held_mib": round(counted[0]["held"] / 2**20),
        }
        for name, (_, *counted) in turns.items()
    }  # fmt: skip
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
