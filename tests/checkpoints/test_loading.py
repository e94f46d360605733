"""Loading: parts of stored arrays, meshes, dtypes, and how much memory it takes."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from elm_jax.checkpoints import Backbone, fingerprint, load_backbone, save_backbone, save_t5x
from elm_jax.checkpoints.loading import load_params
from elm_jax.checkpoints.stored import StoredArray, in_memory, open_safetensors
from elm_jax.errors import ElmError
from elm_jax.experts.apply import backbone_shapes
from elm_jax.experts.tree import flatten
from elm_jax.models import T5Config
from elm_jax.training.backbones import load_backbone_on_mesh
from elm_jax.training.sharding import MeshSpec, make_mesh

CONFIG = T5Config(
    vocab_size=32, emb_dim=12, num_heads=2, head_dim=5, mlp_dim=16,
    num_encoder_layers=1, num_decoder_layers=1,
)  # fmt: skip


def make_backbone(config: T5Config = CONFIG, dtype: Any = np.float32) -> Backbone:
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: rng.normal(0, 0.3, s.shape).astype(dtype), backbone_shapes(config)
    )
    return Backbone("little", config, params, fingerprint(config, params))


# Stored arrays


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("tensors") / "x.safetensors"
    arrays = {
        "one": rng.normal(size=7).astype(np.float16),
        "two": rng.normal(size=(5, 6)).astype(ml_dtypes.bfloat16),
        "four": rng.normal(size=(3, 4, 2, 3)).astype(np.float32),
        "none": np.zeros((0, 3), np.float32),
        "scalar": np.array(3, np.int64),
        "flag": np.array([True, False]),
    }
    save_file(arrays, path, metadata={"format": "pt"})
    return path


def test_safetensors_are_read_as_the_library_reads_them(file: Path) -> None:
    opened, wanted = open_safetensors(file), load_file(file)
    assert opened.keys() == wanted.keys()
    for name, array in opened.items():
        assert (array.shape, array.dtype) == (wanted[name].shape, wanted[name].dtype)
        np.testing.assert_array_equal(array.read(), wanted[name])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_part_is_the_part_of_the_whole(file: Path, data: st.DataObject) -> None:
    """Whatever is transposed, taken apart or joined before."""
    stored = open_safetensors(file)["four"]
    whole = stored.read()
    for _ in range(data.draw(st.integers(0, 3))):
        kind = data.draw(st.sampled_from(["T", "layer", "joined"]))
        if kind == "T":
            stored, whole = stored.T, whole.T
        elif kind == "layer" and whole.ndim > 1:
            axis = data.draw(st.integers(0, whole.ndim - 1))
            number = data.draw(st.integers(0, whole.shape[axis] - 1))
            stored, whole = stored.layer(number, axis), whole.take(number, axis)
        elif whole.ndim > 1:
            axis = data.draw(st.integers(0, whole.ndim - 2))
            shape = (*whole.shape[:axis], -1, *whole.shape[axis + 2 :])
            stored, whole = stored.joined(axis), whole.reshape(shape)
    index = []
    for size in whole.shape:
        start = data.draw(st.integers(0, size - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size))))
    assert stored.shape == whole.shape
    np.testing.assert_array_equal(stored.read(tuple(index)), whole[tuple(index)])
    np.testing.assert_array_equal(stored.cut(stored.source.read()), whole)


def header(entries: Any, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        (2**60).to_bytes(8, "little") + b"{}",
        header(b"{"),
        header(b"[1]"),
        header(b"\xff\xfe"),
        header(b'{"a":' * 100_000),
        header({"a": GOOD}, b"\0" * 7),
        header({"a": GOOD}, b"\0" * 9),
        header({"a": GOOD, "b": GOOD}, b"\0" * 8),
        header({"a": {**GOOD, "data_offsets": [8, 16]}}, b"\0" * 16),
        header({"a": {**GOOD, "data_offsets": [8, 0]}}, b"\0" * 8),
        header({"a": {**GOOD, "shape": [2.0]}}, b"\0" * 8),
        header({"a": {**GOOD, "shape": [-2]}}, b"\0" * 8),
        header({"a": {**GOOD, "shape": [2**62]}}, b"\0" * 8),
        header({"a": {**GOOD, "shape": "2"}}, b"\0" * 8),
        header({"a": {**GOOD, "shape": [True, 2]}}, b"\0" * 8),
        header({"a": {**GOOD, "dtype": "F33"}}, b"\0" * 8),
        header({"a": {**GOOD, "dtype": ["F32"]}}, b"\0" * 8),
        header({"a": {"dtype": "F32"}}, b"\0" * 8),
        header({"a": 3}, b"\0" * 8),
    ],
)
def test_a_damaged_safetensors_file_is_refused_by_its_header(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ElmError, match=r"x\.safetensors: truncated or damaged") as caught:
        open_safetensors(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_dtype_that_no_backbone_has_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(header({"a": {**GOOD, "dtype": "F8_E4M3", "shape": [8]}}, b"\0" * 8))
    with pytest.raises(
        ElmError, match=r"x\.safetensors: tensor 'a' has dtype F8_E4M3, which is not"
    ):
        open_safetensors(path)


def test_a_file_that_is_cut_after_it_was_opened(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file.read_bytes())
    stored = open_safetensors(path)["four"]
    path.write_bytes(b"")
    with pytest.raises(ElmError, match=r"x\.safetensors: truncated while it was being read"):
        stored.read()


def test_more_than_memory_is_an_error_of_the_file() -> None:
    def read(index: Any) -> np.ndarray:
        raise MemoryError

    stored = StoredArray((2**40,), np.dtype(np.float32), "x.safetensors: a", read)
    with pytest.raises(ElmError, match=r"x\.safetensors: a: 4,398,046,511,104 bytes do not fit"):
        stored.read()


# Onto devices


def test_arrays_are_read_once_whatever_comes_of_them() -> None:
    reads = []
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)

    def read(index: Any) -> np.ndarray:
        reads.append(index)
        return values[index]

    stack = StoredArray(values.shape, values.dtype, "stack", read)
    arrays = {f"layers_{i}/scale": stack.layer(i, 1) for i in range(3)}
    params, _ = load_params(CONFIG, arrays, on_host=True)
    assert len(reads) == 1
    for i in range(3):
        np.testing.assert_array_equal(params[f"layers_{i}"]["scale"], values[:, i])
        assert params[f"layers_{i}"]["scale"].base is not values  # it does not keep the stack alive


MESH = """
import json, sys
import jax, numpy as np
from jax.sharding import PartitionSpec
from elm_jax.checkpoints import load_backbone
from elm_jax.checkpoints import loading
from elm_jax.experts.tree import flatten
from elm_jax.training.backbones import backbone_shardings, load_backbone_on_mesh
from elm_jax.training.sharding import MeshSpec, make_mesh

mesh = make_mesh(MeshSpec(data=1, fsdp=2, tensor=2))
for path in sys.argv[1:]:
    host = load_backbone(path, dtype='bfloat16')
    found = load_backbone_on_mesh(path, mesh, dtype='bfloat16')
    assert found.fingerprint == host.fingerprint and found.config == host.config
    wanted = flatten(backbone_shardings(mesh, found.config))
    for name, array in flatten(found.params).items():
        assert array.sharding.is_equivalent_to(wanted[name], array.ndim), name
        assert array.dtype == flatten(host.params)[name].dtype
        np.testing.assert_array_equal(np.asarray(array), np.asarray(flatten(host.params)[name]))
        # A process that needs but its own shards reads those alone.
    stored = __import__('elm_jax.checkpoints').checkpoints.open_backbone(path).arrays
    for name, array in flatten(found.params).items():
        part = loading._shard(stored[name], None, array.dtype, wanted[name])
        np.testing.assert_array_equal(np.asarray(part), np.asarray(array))
kernel = found.params['encoder']['layers_0']['mlp']['wi_0']['kernel']
assert kernel.sharding.spec == PartitionSpec('fsdp', 'tensor')
assert {shard.data.shape for shard in kernel.addressable_shards} == {(6, 8)}
print('done')
"""


def run(program: str, *arguments: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_shards_go_straight_onto_a_mesh(tmp_path: Path) -> None:
    from elm_jax.checkpoints import save_huggingface

    backbone = make_backbone()
    per_layer = make_backbone(CONFIG.replace(relative_attention_per_layer=True))
    paths = (
        save_huggingface(backbone, tmp_path / "hf"),
        save_t5x(per_layer, tmp_path / "run"),
        save_backbone(backbone, tmp_path / "own"),
    )
    devices = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    assert run(MESH, *paths, XLA_FLAGS=devices) == "done\n"


PROCESSES = """
import sys
import jax
path, address, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(address, 2, number)
import numpy as np
from elm_jax.checkpoints import load_backbone, stored
from elm_jax.experts.tree import flatten
from elm_jax.training.backbones import load_backbone_on_mesh
from elm_jax.training.sharding import MeshSpec, make_mesh

asked = []
read = stored.StoredArray.read
def watched(self, index=None):
    asked.append(index is None)
    return read(self, index)
stored.StoredArray.read = watched
found = load_backbone_on_mesh(path, make_mesh(MeshSpec(data=1, fsdp=2)), dtype='bfloat16')
whole = any(asked)
wanted = load_backbone(path, dtype='bfloat16', on_host=True)
assert found.fingerprint == wanted.fingerprint
for name, array in flatten(found.params).items():
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, flatten(wanted.params)[name][shard.index])
print(number, 'reads arrays whole' if whole else 'reads its shards')
"""


def test_processes_read_their_own_shards_and_agree(tmp_path: Path) -> None:
    import socket

    from elm_jax.checkpoints import save_huggingface

    path = save_huggingface(make_backbone(), tmp_path / "hf")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESSES, str(path), address, str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )  # fmt: skip
        for number in range(2)
    ]
    said = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0, 0], said[0][1][-2000:] + said[1][1]
    assert [out.splitlines()[-1] for out, _ in said] == [
        "0 reads arrays whole", "1 reads its shards"
    ]  # fmt: skip


def test_trees_of_shardings(tmp_path: Path) -> None:
    backbone = make_backbone()
    path = save_backbone(backbone, tmp_path / "own")
    mesh = make_mesh(MeshSpec())
    sharded = load_backbone_on_mesh(path, mesh)
    assert sharded.fingerprint == backbone.fingerprint
    for name, array in flatten(sharded.params).items():
        np.testing.assert_array_equal(np.asarray(array), flatten(backbone.params)[name])
        assert isinstance(array.sharding, NamedSharding)
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec())
    tree = jax.tree.map(lambda _: everywhere, backbone.params)
    load_backbone(path, shardings=tree)
    del tree["encoder"]
    with pytest.raises(ElmError, match="tree of shardings lacks 'encoder/encoder_norm/scale'"):
        load_backbone(path, shardings=tree)
    with pytest.raises(ElmError, match="exclude each other"):
        load_backbone(path, shardings=tree, on_host=True)


def test_float16_and_float64_become_what_is_asked(tmp_path: Path) -> None:
    path = save_backbone(make_backbone(dtype=np.float16), tmp_path / "half")
    loaded = load_backbone(path, dtype="float32", on_host=True)
    assert {array.dtype for array in jax.tree.leaves(loaded.params)} == {np.dtype(np.float32)}
    assert loaded.fingerprint == load_backbone(path).fingerprint
    arrays = {"a/scale": in_memory(np.ones(3), "memory")}
    params, _ = load_params(CONFIG, arrays, dtype="bfloat16")
    assert params["a"]["scale"].dtype == np.float32


# Memory

PEAK = """
import json, sys
import jax
jax.block_until_ready(jax.device_put(jax.numpy.ones(3)))
from elm_jax.checkpoints import load_backbone
from elm_jax.training.backbones import load_backbone_on_mesh
from elm_jax.training.sharding import MeshSpec, make_mesh

def read(key):
    for line in open('/proc/self/status'):
        if line.startswith(key):
            return int(line.split()[1]) * 1024

little, *paths = sys.argv[1:]
for path in (little, *paths):
    for way in ('host', 'device', 'bfloat16', 'mesh'):
        open('/proc/self/clear_refs', 'w').write('5')  # the peak starts here
        before = read('VmRSS')
        if way == 'mesh':
            mesh = make_mesh(MeshSpec(data=1, fsdp=2))
            backbone = load_backbone_on_mesh(path, mesh, dtype='bfloat16')
        else:
            dtype = 'bfloat16' if way == 'bfloat16' else None
            backbone = load_backbone(path, dtype=dtype, on_host=way == 'host')
        jax.block_until_ready(backbone.params)
        held = sum(x.nbytes for x in jax.tree.leaves(backbone.params))
        del backbone
        if path != little:  # what is imported and compiled on the way counts but once
            print(json.dumps([path, way, read('VmHWM') - before, held]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_peak_memory(tmp_path: Path) -> None:
    """Less than 1.5 times the largest array, plus what stays."""
    from elm_jax.checkpoints import save_huggingface

    # Large enough that blocks below 32 MiB, which glibc keeps when they are freed, decide nothing.
    config = CONFIG.replace(vocab_size=2**16, emb_dim=384, num_heads=3, head_dim=64, mlp_dim=2**15)
    large, small = make_backbone(config), make_backbone()
    largest = max(array.nbytes for array in jax.tree.leaves(large.params))
    total = sum(array.nbytes for array in jax.tree.leaves(large.params))
    assert total > 4 * largest  # so that a second copy of everything would show
    devices = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    save: Any = {"hf": save_huggingface, "run": functools.partial(save_t5x, layout="orbax")}
    paths = [
        (write(small, tmp_path / f"{n}-small"), write(large, tmp_path / n))
        for n, write in save.items()
    ]
    del large
    # Each in a process of its own, so that none lives on what another left.
    lines = [line for pair in paths for line in run(PEAK, *pair, XLA_FLAGS=devices).splitlines()]
    assert len(lines) == 8
    for path, way, peak, held in map(json.loads, lines):
        assert held == pytest.approx(total if way in ("host", "device") else total / 2, rel=0.01)
        assert peak < 1.5 * largest + held, (
            f"{Path(path).name}, {way}: {peak / 2**20:.0f} MiB for {held / 2**20:.0f} MiB, "
            f"largest array {largest / 2**20:.0f} MiB"
        )
        assert math.isfinite(peak)
