"""Damaged experts of strangers, at random: `python -m tests.experts.fuzz --minutes 10`.

Every mutation is a pure function of its seed. A reader may read what is left, which must then be a
whole expert of finite numbers, or refuse it with an `ElmError` or a `FileNotFoundError`; any other
exception ends the run and names the seed.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import random
import shutil
import struct
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.errors import ElmError
from elm_jax.experts import (
    ExpertInfo,
    ExpertStore,
    check_expert,
    expert_shapes,
    export_expert,
    flatten,
    import_expert,
    load_adapters_expert,
    load_peft_expert,
)
from elm_jax.experts.imports import detect_format
from elm_jax.experts.tree import unflatten
from elm_jax.models import AdapterSpec, LoraSpec, T5Config

CONFIG = T5Config(
    vocab_size=31, emb_dim=12, num_heads=3, head_dim=5, mlp_dim=16,
    num_encoder_layers=2, num_decoder_layers=1,
)  # fmt: skip
BACKBONE = {"name": "little", "fingerprint": "sha256:0"}
LORA = LoraSpec(rank=2, alpha=4, targets=("q", "wi"))
HOULSBY = AdapterSpec(
    bottleneck=5, placement="sequential", sublayers=("self_attention", "mlp"), use_bias=True,
    inner_residual=True,
)  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, -(2**64), 10**400, 0.0, -0.5, 1e308, 1e-308,
    1e999, "", "q", "\ud800", "a" * 5000, "../../etc/passwd", "/dev/zero", "\x00", ".*", "(", "[",
    "(a+)+$", r"(\w*\.?)*q", ".*.*.*.*q", "(?P<idx>q)", r"\1", "a{999999999}", "all-linear",
    [], {}, [[]], {"": {}}, ["q", None], [1, 2, 3], {"q": 1}, {"default": 2}, [True], [2**70],
    "LORA", "lora", "relu", "learned", "post_add", ["wi_0"], r"encoder\..*", "(?i)q",
]  # fmt: skip


def random_tree(spec: Any) -> Any:
    rng = np.random.default_rng(0)
    shapes = flatten(expert_shapes(CONFIG, spec))
    return unflatten({k: rng.normal(size=s.shape).astype(np.float32) for k, s in shapes.items()})


def make_seeds(folder: Path) -> dict[str, Path]:
    """Writes one whole expert in each format."""
    store = ExpertStore(folder / "store", create=True)
    for name, spec in (("lora", LORA), ("houlsby", HOULSBY)):
        store.write(ExpertInfo(name, spec, ("task",), (), BACKBONE), random_tree(spec))
    made = {"peft": "lora", "adapters": "houlsby", "safetensors": "lora", "npz": "houlsby"}
    return {
        format: export_expert(store, name, folder / format, format=format)
        for format, name in made.items()
    }


def read(folder: Path) -> str:
    """Reads what is there, checks that it is whole, and returns its format."""
    format = detect_format(folder)
    if format == "t5x":
        return format
    if format == "own":
        store = ExpertStore(folder.parent / "there", create=True)
        spec = import_expert(store, folder, "new", config=CONFIG, backbone=BACKBONE).spec
        params = store.load("new", backbone=BACKBONE)[1]
    else:
        load: Any = load_peft_expert if format == "peft" else load_adapters_expert
        spec, params = load(folder, CONFIG)
    check_expert(str(folder), CONFIG, spec, params)
    assert all(np.isfinite(leaf).all() for leaf in flatten(params).values())
    return format


def _spots(data: Any) -> list[tuple[Any, Any]]:
    """Returns every (container, key) of a JSON value."""
    keys = list(data) if isinstance(data, dict) else list(range(len(data)))
    inner = [
        spot for key in keys if isinstance(data[key], (dict, list)) for spot in _spots(data[key])
    ]
    return [(data, key) for key in keys] + inner


def mutate_json(rng: random.Random, text: bytes) -> bytes:
    """Changes, drops, adds or moves values of a JSON object."""
    data = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        spots = _spots(data)
        if not spots:
            break
        container, key = rng.choice(spots)
        kind = rng.randrange(5)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice(["extra", "__proto__", "q", "\ud800", "use_dora"])] = rng.choice(
                VALUES
            )
        elif kind == 2:
            other, there = rng.choice(spots)
            with_copy = copy.deepcopy(container[key])
            if there in (other if isinstance(other, dict) else range(len(other))):
                other[there] = with_copy
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(data).encode()


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flips, cuts, repeats or inserts bytes."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(out) + 1), rng.randint(1, 40)
        kind = rng.randrange(5)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at : at + length]
        elif kind == 2:
            out[at:at] = rng.randbytes(length)
        elif kind == 3:
            out[at:at] = out[at : at + length]
        else:
            del out[at:]
    return bytes(out)


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Changes the header of a safetensors file, its length included, or the bytes after it."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = rng.randrange(5)
    if kind == 0:
        size = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])
        return struct.pack("<Q", size) + header + body
    if kind == 1:
        body = mutate_bytes(rng, body)
    elif kind == 2:
        header = mutate_bytes(rng, header)
    else:
        tensors = json.loads(header)
        name = rng.choice([key for key in tensors if key != "__metadata__"])
        field = rng.choice(["dtype", "shape", "data_offsets", "name"])
        if field == "name":
            tensors[rng.choice([name + "x", "", "../x", "a/b/../c", name.upper()])] = tensors.pop(
                name
            )
        elif field == "dtype":
            tensors[name][field] = rng.choice(["F64", "I8", "BF16", "F8_E4M3", "BOOL", "F16", 3])
        else:
            numbers = rng.choice([[0], [0, 2**62], [2**40], [-1, 4], [1, 1], [], [4, 0], [2.5]])
            tensors[name][field] = rng.choice([numbers, tensors[name][field][::-1]])
        header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header + body


def mutate_npz(rng: random.Random, data: bytes) -> bytes:
    """Changes a member of an npz file: its header, its name or its compression."""
    if rng.randrange(3) == 0:
        return mutate_bytes(rng, data)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        victim = rng.choice(old.namelist())
        for name in old.namelist():
            member = old.read(name)
            if name == victim:
                kind = rng.randrange(5)
                if kind == 0:
                    continue
                if kind == 1:
                    name = rng.choice(["../x.npy", "x", name + "x", "/etc/x.npy"])
                elif kind == 2:
                    member = mutate_bytes(rng, member)
                elif kind == 3:
                    shape = rng.choice(
                        ["(2**40,)", "(1000000000000,)", "()", "(-1,)", "__import__('os')"]
                    )
                    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n"
                    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode()
                else:
                    head = "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
                    member = (
                        b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode() + member
                    )
            new.writestr(name, member, rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    return out.getvalue()


def mutate(seed: int, seeds: dict[str, Path], folder: Path) -> None:
    """Writes a damaged copy of one of the seeds to a new folder."""
    rng = random.Random(seed)
    shutil.copytree(seeds[rng.choice(sorted(seeds))], folder)
    for _ in range(rng.choice([1, 1, 1, 2])):
        path = rng.choice(sorted(p for p in folder.iterdir() if p.is_file()) or [folder / "none"])
        by_kind: dict[str, Callable[[random.Random, bytes], bytes]] = {
            ".json": mutate_json, ".safetensors": mutate_safetensors, ".npz": mutate_npz,
        }  # fmt: skip
        kind = rng.randrange(20)
        try:
            if kind == 0:
                path.unlink()
            elif kind == 1:
                path.rename(path.with_suffix(".bin"))
            elif kind == 2:
                path.unlink()
                path.mkdir()
            elif kind < 6:
                path.write_bytes(mutate_bytes(rng, path.read_bytes()))
            else:
                path.write_bytes(by_kind[path.suffix](rng, path.read_bytes()))
        except Exception:  # of a mutation, not of a reader: the first damage left it nothing
            continue


def fuzz(
    first: int, *, count: int | None = None, minutes: float | None = None
) -> tuple[Counter[str], tuple[float, int]]:
    """Reads damaged experts, from seed `first` on.

    Returns:
      How often each thing came of them; the seconds and the seed of the slowest one.
    """
    outcomes: Counter[str] = Counter()
    slowest = (0.0, first)
    end = None if minutes is None else time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as name:
        seeds = make_seeds(Path(name))
        seed = first
        while (count is None or seed < first + count) and (end is None or time.monotonic() < end):
            folder = Path(name) / "damaged" / "expert"
            mutate(seed, seeds, folder)
            start = time.monotonic()
            try:
                outcomes[f"read as {read(folder)}"] += 1
            except (ElmError, FileNotFoundError) as error:
                outcomes[type(error).__name__] += 1
            except Exception as error:
                raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
            if time.monotonic() - start > slowest[0]:
                slowest = (time.monotonic() - start, seed)
            shutil.rmtree(folder.parent)
            seed += 1
    return outcomes, slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    print(f"from seed {args.seed}")
    outcomes, (seconds, seed) = fuzz(args.seed, minutes=args.minutes)
    for outcome, times in outcomes.most_common():
        print(f"{times:8,}  {outcome}")
    print(f"slowest: seed {seed}, {seconds:.2f} s")


if __name__ == "__main__":
    main()
