"""Meshes: one set of rules, the same losses on eight devices as on one, and named mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from elm_jax.errors import ElmError
from elm_jax.experts import expert_shapes, flatten, logical_axes
from elm_jax.experts.apply import backbone_shapes
from elm_jax.models import PRESETS, T5Config, get_spec
from elm_jax.training import MeshSpec, make_mesh
from elm_jax.training.sharding import RULES, partition_spec, shardings

CONFIG = T5Config(
    vocab_size=24, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=24,
    num_encoder_layers=1, num_decoder_layers=1,
)  # fmt: skip

# Runs where eight devices are forced; prints what each mesh gave, or the error it raised.
PROGRAM = """
import json, sys
import jax
sys.path.insert(0, sys.argv[1])
import tiny
from elm_jax.checkpoints.backbone import initialize
from elm_jax.models import T5Config, get_spec
from elm_jax.training import *

assert jax.device_count() == 8
config = T5Config(24, 16, 2, 8, 24, 1, 1, dropout_rate=0.0)
optimizers = {"adamw": OptimizerSpec(), "adafactor": OptimizerSpec(name="adafactor")}
out = {}

def losses(label, mesh, kind="adapter", optimizer="adamw", rows=8, count=2, devices=None, **sizes):
    members = [Member(f"e{i}", tiny.Stream(i, config, rows)) for i in range(count)]
    run = RunConfig(train_steps=3, optimizer=optimizers[optimizer], log_every=1)
    try:
        trained = train_stack(
            config.replace(**sizes), initialize(config.replace(**sizes), 0).params, get_spec(kind),
            members, run, folder=f"{sys.argv[2]}/{label}", mesh=make_mesh(mesh, devices),
        )
    except ValueError as error:
        out[label] = f"{type(error).__name__}: {error}"
        return
    out[label] = [[row["loss"] for row in t.history] for t in trained]

one = jax.devices()[:1]
losses("one", MeshSpec(), devices=one)
losses("all", MeshSpec(expert=2, data=2, fsdp=2))
losses("one_full", MeshSpec(), "full", "adafactor", devices=one)
losses("full", MeshSpec(expert=2, fsdp=2, tensor=2), "full", "adafactor")
losses("rows", MeshSpec(), rows=6)
losses("stack", MeshSpec(expert=2), count=3)
losses("heads", MeshSpec(tensor=8), mlp_dim=20)
losses("few", MeshSpec(expert=3), count=3)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> dict:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    tests = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tests), str(tmp_path_factory.mktemp("runs"))],
        env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_losses_do_not_depend_on_the_mesh(eight: dict) -> None:
    assert np.shape(eight["one"]) == (2, 3)
    np.testing.assert_allclose(eight["all"], eight["one"], rtol=2e-4)


def test_tensor_parallel_full_experts_with_factored_moments(eight: dict) -> None:
    np.testing.assert_allclose(eight["full"], eight["one_full"], rtol=2e-4)


def test_sizes_that_do_not_divide_are_named(eight: dict) -> None:
    axes = r"over mesh axes ('data', 'fsdp')"
    assert eight["rows"] == f"ElmError: a batch of size 6 cannot be split 8 ways {axes}"
    assert "a stack of experts of size 3 cannot be split 2 ways" in eight["stack"]
    assert "mlp/wi_0/kernel: axis 'mlp' of size 20 cannot be split 8 ways" in eight["heads"]
    assert "does not fit 8 devices" in eight["few"]


@pytest.mark.parametrize("kind", PRESETS)
def test_rules_cover_every_array(kind: str) -> None:
    spec, mesh = get_spec(kind), make_mesh()
    backbone_axes, expert_axes = logical_axes(CONFIG, spec)
    for axes, shapes, stacked in (
        (backbone_axes, backbone_shapes(CONFIG), False),
        (expert_axes, expert_shapes(CONFIG, spec), True),
    ):
        placed = shardings(mesh, axes, shapes, stacked=stacked)
        assert set(flatten(placed)) == set(flatten(shapes))
        for path, sharding in flatten(placed).items():
            assert len(sharding.spec) == len(flatten(shapes)[path].shape) + stacked
            assert not stacked or sharding.spec[0] == "expert"


def test_rules_by_name() -> None:
    assert partition_spec(("embed", "mlp")) == PartitionSpec("fsdp", "tensor")
    assert partition_spec(("batch", None, "rank")) == PartitionSpec(("data", "fsdp"), None, None)
    assert len(dict(RULES)) == len(RULES)


def test_axis_without_a_rule() -> None:
    with pytest.raises(ElmError, match=r"a/w: no sharding rule for axis 'emded'.*'embed'"):
        partition_spec(("emded",), "a/w")
    shapes = {"w": jax.ShapeDtypeStruct((2,), np.float32)}
    with pytest.raises(ElmError, match="w: has no logical axis names"):
        shardings(make_mesh(), {}, shapes)


def test_meshes() -> None:
    mesh = make_mesh(MeshSpec(), jax.devices()[:1])
    assert dict(mesh.shape) == {"expert": 1, "data": 1, "fsdp": 1, "tensor": 1}
    with pytest.raises(ElmError, match="tensor=3 does not fit 1 devices"):
        make_mesh(MeshSpec(tensor=3), jax.devices()[:1])
    with pytest.raises(ElmError, match="mesh axis 'fsdp' must be a positive integer, got 0"):
        MeshSpec(fsdp=0)
