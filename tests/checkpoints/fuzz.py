"""Feeds damaged checkpoints to the readers: nothing but ElmError or FileNotFoundError comes out.

    python tests/checkpoints/fuzz.py --minutes 10 [--seed 0]

Each trial takes a small good checkpoint, damages one file of it (bytes, or the structure of its
JSON or msgpack), loads it, and repairs it. A failure is printed with its trial, which
`--seed S --trial N` runs alone.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import msgpack
import numpy as np
import orbax.checkpoint as ocp

from elm_jax.checkpoints import (
    Backbone,
    fingerprint,
    load_backbone,
    save_backbone,
    save_huggingface,
    save_t5x,
)
from elm_jax.errors import ElmError
from elm_jax.experts.apply import backbone_shapes
from elm_jax.models import T5Config

CONFIG = T5Config(
    vocab_size=17, emb_dim=6, num_heads=3, head_dim=2, mlp_dim=8,
    num_encoder_layers=1, num_decoder_layers=1,
)  # fmt: skip
FAILED = 3
ALLOWED = (ElmError, FileNotFoundError)
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 17, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, "",
    "a", "..", "../x", "/etc/passwd", "a/b", "\0", "\ud800", "x" * 5000, [], {}, [[]], [0], [-1],
    [2**62], {"a": 1}, "F32", "float32", "gated-gelu", "t5", "ByT5Tokenizer",
    "PLACEHOLDER://../../x", b"bytes", b"\xff",
)  # fmt: skip


def build(folder: Path) -> dict[str, Path]:
    """Writes a good checkpoint of each kind; returns name -> what `load_backbone` takes."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), backbone_shapes(CONFIG)
    )
    made = Backbone("little", CONFIG, params, fingerprint(CONFIG, params))
    tokenizer = folder / "bytes.json"
    tokenizer.write_text('{"tokenizer_class": "ByT5Tokenizer", "extra_ids": 5}')
    withbytes = Backbone("little", CONFIG, params, made.fingerprint, tokenizer)
    paths = {
        "own": save_backbone(made, folder / "own"),
        "own orbax": save_backbone(made, folder / "own_orbax", arrays="orbax"),
        "huggingface": save_huggingface(withbytes, folder / "hf"),
        "sharded": save_huggingface(made, folder / "sharded"),
        "t5x": save_t5x(made, folder / "t5x"),
        "t5x legacy": save_t5x(made, folder / "t5x_legacy", layout="legacy"),
        "t5x zarr": folder / "t5x_zarr",
    }
    _shard(paths["sharded"])
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(paths["t5x zarr"] / "state", {"target": params, "state": {"step": 3}})
    return paths


def _shard(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    names = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in ("part-0.safetensors", "part-1.safetensors"):
        save_file({k: v for k, v in tensors.items() if names[k] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    whole.unlink()


# Damage


def flip(rng: np.random.Generator, data: bytes) -> bytes:
    """Changes, cuts, repeats or inserts bytes."""
    kind = rng.integers(6)
    if kind == 0:
        return data[: rng.integers(len(data) + 1)]
    if kind == 1:
        return b"" if rng.integers(2) else bytes(rng.integers(0, 256, rng.integers(40)).tolist())
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(len(changed))) if changed else 0
        if kind == 2:
            changed[at : at + 1] = bytes([int(rng.integers(256))])
        elif kind == 3:
            changed[at:at] = bytes(rng.integers(0, 256, rng.integers(1, 9)).tolist())
        elif kind == 4:
            end = int(rng.integers(at, min(len(changed), at + 40) + 1))
            changed[at:at] = changed[at:end]
        else:
            del changed[at : at + int(rng.integers(1, 9))]
    return bytes(changed)


def mutate(rng: np.random.Generator, tree: Any) -> Any:
    """Changes a few nodes of a JSON-like tree."""
    tree = copy.deepcopy(tree)
    for _ in range(int(rng.integers(1, 4))):
        spots = [spot for spot in _spots(tree)]
        if not spots:
            return ODD_VALUES[rng.integers(len(ODD_VALUES))]
        node, key = spots[rng.integers(len(spots))]
        kind, value = rng.integers(6), ODD_VALUES[rng.integers(len(ODD_VALUES))]
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[str(value) if rng.integers(4) else f"{key}x"] = node.pop(key)
        elif kind == 2 and isinstance(node, dict):
            node[f"{key}/x" if rng.integers(2) else str(value)] = copy.deepcopy(node[key])
        elif kind == 3:  # the value of another place
            other, name = spots[rng.integers(len(spots))]
            node[key] = copy.deepcopy(other[name])
        elif kind == 4 and type(node[key]) is int:
            node[key] += int(rng.integers(-3, 4)) if rng.integers(2) else int(node[key]) ** 3
        else:
            node[key] = copy.deepcopy(value)
    return tree


def _spots(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in items:
        yield tree, key
        yield from _spots(value)


def _json(tree: Any) -> bytes:
    plain = json.dumps(tree, default=lambda value: value.decode("latin-1"))
    return plain.encode("utf-8", errors="surrogatepass")


def damage(rng: np.random.Generator, path: Path, data: bytes) -> bytes:
    """Returns damaged contents of a file, by its structure where it has one."""
    if rng.integers(3) == 0:
        return flip(rng, data)
    try:
        if path.suffix == ".safetensors":
            length = int.from_bytes(data[:8], "little")
            text = _json(mutate(rng, json.loads(data[8 : 8 + length])))
            return len(text).to_bytes(8, "little") + text + data[8 + length :]
        if path.name == "checkpoint":
            tree = msgpack.unpackb(data, strict_map_key=False)
            return msgpack.packb(mutate(rng, tree), default=str, unicode_errors="surrogatepass")
        if path.suffix == ".json" or path.name.startswith((".z", "_")):
            return _json(mutate(rng, json.loads(data)))
        if path.suffix == ".gin":
            lines = data.decode().splitlines()
            at = int(rng.integers(len(lines)))
            name = lines[at].split("=")[0]
            lines[at] = f"{name} = {ODD_VALUES[rng.integers(len(ODD_VALUES))]!r}"
            return "\n".join(lines).encode("utf-8", errors="surrogatepass")
    except (ValueError, OverflowError, RecursionError, TypeError):
        pass  # what cannot be written down again
    return flip(rng, data)


def trial(paths: dict[str, Path], seed: int, number: int) -> tuple[str, BaseException | None]:
    """Damages one file, loads, repairs.

    Returns:
      A label of what was done and came out, and the exception that should not have.
    """
    rng = np.random.default_rng([seed, number])
    kind = sorted(paths)[rng.integers(len(paths))]
    files = sorted(path for path in paths[kind].rglob("*") if path.is_file())
    # Files of structure are the more interesting ones.
    weights = np.array([1.0 if path.name[0].isdigit() or "d" in path.parts[-2:] else 6.0
                        for path in files])  # fmt: skip
    path = files[rng.choice(len(files), p=weights / weights.sum())]
    before = path.read_bytes()
    label = f"{kind} {path.relative_to(paths[kind])}"
    try:
        if rng.integers(40) == 0:
            path.unlink()
        else:
            path.write_bytes(damage(rng, path, before))
        load_backbone(paths[kind], on_host=True)
    except ALLOWED as error:
        text = str(error)
        if "\n" in text or len(text) > 1500:
            return f"{label}: a message of {len(text)} characters", error
        return f"{kind}: refused", None
    except BaseException as error:  # what this script is for; a panic of a library is none of ours
        return label, error
    finally:
        path.write_bytes(before)
    return f"{kind}: loaded", None


def run(
    seconds: float | None,
    trials: int | None,
    seed: int,
    first: int = 0,
    progress: Path | None = None,
) -> list[str]:
    """Runs trials for a time or a number of them; returns the failures, shown.

    `progress` is a file that holds the number of the trial under way.
    """
    failures: list[str] = []
    counts: collections.Counter[str] = collections.Counter()
    slowest = (0.0, 0)
    with tempfile.TemporaryDirectory(prefix="elm_jax_fuzz_") as folder:
        paths = build(Path(folder))
        started, number = time.monotonic(), first
        while (trials is None or number < first + trials) and (
            seconds is None or time.monotonic() - started < seconds
        ):
            if progress is not None:
                progress.write_text(str(number))
            begun = time.monotonic()
            label, error = trial(paths, seed, number)
            slowest = max(slowest, (time.monotonic() - begun, number))
            if error is not None:
                counts["failed"] += 1
                lines = "".join(traceback.format_exception(error)).splitlines()[-12:]
                shown = "\n".join(line[:300] for line in lines)
                failures.append(f"seed {seed} trial {number}: {label}\n{shown}")
            else:
                counts[label] += 1
            number += 1
        for path in paths.values():
            load_backbone(path, on_host=True)  # repaired after every trial
    print(
        f"{number - first} trials in {time.monotonic() - started:.0f} s, {len(failures)} failures; "
        f"slowest {slowest[0]:.2f} s (trial {slowest[1]}); peak memory "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB; {dict(counts)}"
    )
    return failures


def watch(minutes: float, seed: int) -> list[str]:
    """Runs trials in child processes, so that one which ends its process is a failure, too."""
    failures, number, end = [], 0, time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "trial"
        while (left := end - time.monotonic()) > 0:
            command = [sys.executable, __file__, "--seed", str(seed), "--first", str(number),
                       "--minutes", str(left / 60), "--progress", str(progress)]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            print(done.stdout, end="", flush=True)
            if done.returncode == 0:
                break
            if done.returncode == FAILED:
                failures.append(done.stderr)
                break
            number = int(progress.read_text())
            shown = "\n".join(line[:300] for line in done.stderr.splitlines()[-5:])
            failures.append(f"seed {seed} trial {number}: exit {done.returncode}\n{shown}")
            number += 1
    return failures


def main() -> int:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trial", type=int, help="run this one alone")
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--progress", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trial is not None:
        failures = run(None, 1, args.seed, args.trial)
    elif args.progress is not None:
        failures = run(60 * args.minutes, None, args.seed, args.first, args.progress)
    else:
        failures = watch(args.minutes, args.seed)
    for failure in failures[:20]:
        print(failure, file=sys.stderr)
    return FAILED if failures else 0


if __name__ == "__main__":
    sys.exit(main())
