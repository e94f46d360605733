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
from elm_jax.training import MeshSpec, OptimizerSpec, make_mesh
from elm_jax.training.hlo import collectives, products
from elm_jax.training.program import build_program
from elm_jax.training.sharding import (
    RULES,
    abstract_mesh,
    backbone_shardings,
    check_work,
    optimizer_shardings,
    parse_rule,
    partition_spec,
    shardings,
)

CONFIG = T5Config(
    vocab_size=24, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=24,
    num_encoder_layers=1, num_decoder_layers=1,
)  # fmt: skip
LAYOUTS = {
    "data_parallel": "data_parallel",
    "fsdp": "fsdp",
    "tensor_parallel": "tensor_parallel",
    "expert_parallel": "expert_parallel=2 data=4",
    "all": "expert=2,data=2,fsdp=2",
    "single": "single",
}
"""Every preset, and products of them."""
PROGRAMS = [
    ("tensor_step", "adapter", "tensor=8"),
    ("fsdp_step", "adapter", "fsdp=8"),
    ("full_step", "full", "tensor=8"),
]
SIZES = (56, 32, 8, 8, 80, 1, 1)
"""Steps whose compiled text is read, and sizes of which no two products of 8 x 12 or 8 x 6 tokens
have the shape of a kernel."""

# Runs where eight devices are forced; prints what each mesh gave, or the error it raised.
PROGRAM = f"""
import json, sys
import jax
sys.path.insert(0, sys.argv[1])
import tiny
from elm_jax.checkpoints.backbone import initialize
from elm_jax.models import T5Config, get_spec
from elm_jax.training import *

assert jax.device_count() == 8
config = T5Config(24, 16, 8, 2, 24, 1, 1, dropout_rate=0.0)
optimizers = {{"adamw": OptimizerSpec(), "adafactor": OptimizerSpec(name="adafactor")}}
out = {{}}

def losses(label, mesh, kind="adapter", optimizer="adamw", rows=8, count=2, rules={{}}, **sizes):
    members = [Member(f"e{{i}}", tiny.Stream(i, config, rows)) for i in range(count)]
    run = RunConfig(train_steps=3, optimizer=optimizers[optimizer], log_every=1)
    try:
        spec = MeshSpec.parse(mesh, rules)
        trained = train_stack(
            config.replace(**sizes), initialize(config.replace(**sizes), 0).params, get_spec(kind),
            members, run, folder=f"{{sys.argv[2]}}/{{label}}", mesh=make_mesh(spec),
            rules=spec.logical_rules(),
        )
    except ValueError as error:
        out[label] = f"{{type(error).__name__}}: {{error}}"
        return
    out[label] = [[row["loss"] for row in t.history] for t in trained]

for label, mesh in {LAYOUTS}.items():
    losses(label, mesh)
changed = {{"adapter": "tensor", "batch": "data", "vocab": ()}}
losses("three", "fsdp=2 tensor=2 data_parallel", rules=changed)
losses("one_full", "single", "full", "adafactor")
losses("full", "expert=2,fsdp=2,tensor=2", "full", "adafactor")
losses("rows", "data_parallel", rows=6)
losses("stack", "expert=2", count=3)
losses("mlp", "tensor=8", mlp_dim=20)
losses("few", "expert=3", count=3)

import jax.numpy as jnp
from elm_jax.experts.apply import backbone_shapes
from elm_jax.training.program import abstract_batch, abstract_keys, build_program

for label, kind, mesh in {PROGRAMS}:
    sizes = T5Config(*{SIZES})
    spec = get_spec(kind, bottleneck=5) if kind == "adapter" else get_spec(kind)
    place = make_mesh(MeshSpec.parse(mesh))
    built = build_program(sizes, spec, 1, place, one_by_one=True)
    backbone = backbone_shapes(sizes)
    lowered = built.jit_step().lower(
        built.shapes, backbone, abstract_keys(1), abstract_batch(1, 8, 12, 6)
    )
    out[label] = lowered.compile().as_text()
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> dict:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    tests = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tests), str(tmp_path_factory.mktemp("runs"))],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("layout", [*LAYOUTS, "three"])
def test_losses_do_not_depend_on_the_mesh(eight: dict, layout: str) -> None:
    assert np.shape(eight["single"]) == (2, 3)
    np.testing.assert_allclose(eight[layout], eight["single"], rtol=2e-4)


def test_tensor_parallel_full_experts_with_factored_moments(eight: dict) -> None:
    np.testing.assert_allclose(eight["full"], eight["one_full"], rtol=2e-4)


def test_what_does_not_divide_is_named_with_the_nearest_that_would(eight: dict) -> None:
    assert eight["rows"] == (
        "ElmError: a batch of size 6 cannot be split 8 ways over mesh axes ('data', 'fsdp'); "
        "nearest that would: 6 ways, or a size of 8"
    )
    assert "a stack of experts of size 3 cannot be split 2 ways" in eight["stack"]
    assert "nearest that would: 1 or 3 ways, or a size of 2 or 4" in eight["stack"]
    assert (
        "mlp/wi_0/kernel: axis 'mlp' of size 20 cannot be split 8 ways over mesh axes "
        "('tensor',); nearest that would: 5 or 10 ways"
    ) in eight["mlp"]
    assert (
        "mesh expert=3 x data=-1 x fsdp=1 x tensor=1 needs a multiple of 3 devices, so it does "
        "not fit 8 devices; nearest that does: expert=4 x data=2 x fsdp=1 x tensor=1"
    ) in eight["few"]


def kernels(ways: int) -> set[tuple[int, ...]]:
    """The shapes of the backbone's matrices, split so many ways over `tensor` or not."""
    config = T5Config(*SIZES)
    names = flatten(logical_axes(config, None)[0])
    shapes = {path: leaf.shape for path, leaf in flatten(backbone_shapes(config)).items()}
    split = {
        tuple(
            size // (ways if dict(RULES)[name] == ("tensor",) else 1)
            for size, name in zip(shape, names[path], strict=True)
        )
        for path, shape in shapes.items()
        if path.endswith(("kernel", "embedding")) and "relpos" not in path
    }
    return split | {shape[::-1] for shape in split}


def test_tensor_parallel_step_gathers_no_matrix_of_the_backbone(eight: dict) -> None:
    gathered = [c for c in collectives(eight["tensor_step"]) if c.kind == "all-gather"]
    whole = kernels(1)
    assert not [c for c in gathered if any(shape[-2:] in whole for shape in c.shapes)]
    # The same reading finds them where they are gathered on purpose.
    fsdp = [c for c in collectives(eight["fsdp_step"]) if c.kind == "all-gather"]
    assert [c for c in fsdp if any(shape[-2:] in whole for shape in c.shapes)]
    assert any(c.kind == "all-reduce" for c in collectives(eight["tensor_step"]))


def test_no_gradient_of_a_frozen_matrix_is_computed(eight: dict) -> None:
    matrices = kernels(8) | kernels(1)
    assert products(eight["tensor_step"])
    assert not [shape for shape in products(eight["tensor_step"]) if shape[-2:] in matrices]
    # The same reading finds them where all weights are trained.
    found = {shape[-2:] for shape in products(eight["full_step"])} & matrices
    assert len(found) >= 4


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("kind", PRESETS)
def test_rules_cover_every_array(kind: str, scanned: bool) -> None:
    spec, mesh = get_spec(kind), make_mesh()
    config = CONFIG.replace(scan_layers=scanned)
    backbone_axes, expert_axes = logical_axes(config, spec)
    for axes, shapes, stacked in (
        (backbone_axes, backbone_shapes(config), False),
        (expert_axes, expert_shapes(config, spec), True),
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
    with pytest.raises(ElmError, match="w: 2 axis names for shape"):
        shardings(make_mesh(), {"w": ("embed", "mlp")}, shapes)


def test_rules_may_be_changed() -> None:
    spec = MeshSpec(rules={"adapter": "tensor", "embed": (), "batch": ["data"]})
    assert hash(spec) == hash(MeshSpec(rules=spec.rules))
    rules = spec.logical_rules()
    assert partition_spec(("embed", "adapter"), rules=rules) == PartitionSpec(None, "tensor")
    assert dict(rules)["batch"] == ("data",) and dict(rules)["vocab"] == ("tensor",)
    with pytest.raises(ElmError, match="no such logical axis.*did you mean 'adapter'"):
        MeshSpec(rules={"adaptor": "tensor"})
    with pytest.raises(ElmError, match="rule for 'mlp': no mesh axis 'tensr'.*'tensor'"):
        MeshSpec(rules={"mlp": "tensr"})
    with pytest.raises(ElmError, match="expected LOGICAL_AXIS=MESH_AXIS"):
        parse_rule("mlp")
    twice = MeshSpec(rules={"embed": "tensor"}).logical_rules()
    with pytest.raises(ElmError, match="w: rules split both 'embed' and 'mlp' over .* 'tensor'"):
        partition_spec(("embed", "mlp"), "w", twice)


@pytest.mark.parametrize(("axis", "logical"), [("fsdp", "embed"), ("tensor", "vocab")])
def test_backbone_is_not_replicated_by_accident(axis: str, logical: str) -> None:
    axes, shapes = logical_axes(CONFIG, None)[0], backbone_shapes(CONFIG)
    mesh = abstract_mesh(MeshSpec.parse(f"{axis}=2"))
    backbone_shardings(mesh, axes, shapes)
    off = {name: () for name in ("embed", "vocab", "mlp", "joined_kv")}
    rules = MeshSpec(rules=off).logical_rules()
    with pytest.raises(ElmError, match=f"'{axis}' has 2 ways, but the rules split 0%.*{logical}="):
        backbone_shardings(mesh, axes, shapes, rules)
    backbone_shardings(abstract_mesh(MeshSpec(data=2)), axes, shapes, rules)  # asked for


def test_state_of_optimizers_lies_as_its_expert() -> None:
    mesh, spec = abstract_mesh(MeshSpec.parse("expert=2,fsdp=2,tensor=2")), get_spec("full")
    config = CONFIG.replace(emb_dim=256, mlp_dim=512, vocab_size=256)
    specs = {}
    for name in ("adamw", "adafactor"):
        program = build_program(config, spec, 2, mesh, optimizer=OptimizerSpec(name=name))
        leaves = jax.tree_util.tree_leaves_with_path(program.state.opt_state)
        specs |= {
            jax.tree_util.keystr(path, simple=True, separator="/"): s.spec for path, s in leaves
        }

    def one(state: str, array: str) -> PartitionSpec:
        [found] = [spec for path, spec in specs.items() if f"/{state}/" in path and array in path]
        return found

    kernel = "decoder/layers_0/mlp/wo/kernel"
    assert one("mu", kernel) == one("nu", kernel) == PartitionSpec("expert", "tensor", "fsdp")
    # Adafactor sums over the longer axis (mlp) in one moment, over the other (embed) in the other.
    assert one("v_row", kernel) == PartitionSpec("expert", "fsdp")
    assert one("v_col", kernel) == PartitionSpec("expert", "tensor")
    assert one("v", "decoder/decoder_norm/scale") == PartitionSpec("expert", "fsdp")
    assert one("v_row", "decoder/decoder_norm/scale") == PartitionSpec("expert")  # placeholder
    # Of a square array nobody can tell which axis is missing.
    assert one("v_row", "token_embedder/embedding") == PartitionSpec("expert")


def test_optimizer_state_of_nothing_is_named() -> None:
    mesh, shape = abstract_mesh(MeshSpec(data=1)), jax.ShapeDtypeStruct((1, 3), np.float32)
    with pytest.raises(ElmError, match=r"optimizer state mu/b of shape \(1, 3\) belongs to no"):
        optimizer_shardings(mesh, {"mu": {"b": shape}}, {}, {})


def test_meshes() -> None:
    mesh = make_mesh(MeshSpec(), jax.devices()[:1])
    assert dict(mesh.shape) == {"expert": 1, "data": 1, "fsdp": 1, "tensor": 1}
    with pytest.raises(ElmError, match="tensor=3 needs a multiple of 3 .* does not fit 1 devices"):
        make_mesh(MeshSpec(tensor=3), jax.devices()[:1])
    with pytest.raises(ElmError, match="mesh axis 'fsdp' must be a positive integer or -1, got 0"):
        MeshSpec(fsdp=0)
    with pytest.raises(ElmError, match="'data' and 'fsdp' are both -1"):
        MeshSpec(fsdp=-1)
    assert MeshSpec(fsdp=4).fit(16) == {"expert": 1, "data": 4, "fsdp": 4, "tensor": 1}
    assert dict(abstract_mesh(MeshSpec(fsdp=4)).shape)["data"] == 1
    with pytest.raises(ElmError, match="needs 12 devices.*nearest that does: expert=1 x data=4 x"):
        MeshSpec(data=3, fsdp=4).fit(16)
    check_work(abstract_mesh(MeshSpec(expert=2, data=2, fsdp=2)), 4, 8)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("single", (1, 1, 1, 1)),
        ("fsdp", (1, 1, -1, 1)),
        ("data_parallel", (1, -1, 1, 1)),
        ("tensor_parallel=2 data=4", (1, 4, 1, 2)),
        ("data=2,fsdp=4,tensor=1,expert=2", (2, 2, 4, 1)),
        ("fsdp=4", (1, -1, 4, 1)),
        ("", (1, -1, 1, 1)),
    ],
)
def test_meshes_as_users_write_them(text: str, sizes: tuple) -> None:
    assert tuple(MeshSpec.parse(text).sizes().values()) == sizes
    assert MeshSpec.parse(text.split()) == MeshSpec.parse(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fdsp=4", "no axis 'fdsp' (did you mean 'fsdp'?)"),
        ("singel", "no axis 'singel'"),
        ("tensor", "expected tensor=N"),
        ("tensor=two", "'two' is not a whole number"),
        ("fsdp=2,fsdp=4", "sets the axis 'fsdp' twice"),
        ("fsdp,tensor_parallel", "are both -1"),
    ],
)
def test_mistakes_in_meshes(text: str, said: str) -> None:
    with pytest.raises(ElmError) as error:
        MeshSpec.parse(text)
    assert said in str(error.value)


def test_gin_presets_are_the_meshes_they_are_called() -> None:
    code = """
import gin, json, pathlib
from elm_jax.gin_utils import gin_folder
out = {}
for path in sorted((gin_folder() / "sharding").glob("*.gin")):
    gin.clear_config()
    lines = ["import builtins", "builtins.dict.mesh = @sharding.MeshSpec()"]
    changes = ["FSDP = 4", "SHARDING_RULES = {'adapter': 'tensor'}"]
    lines += changes if path.stem == "product" else []
    gin.parse_config([path.read_text(), *lines])
    spec = gin.get_configurable(dict)()["mesh"]
    out[path.stem] = [list(spec.sizes().values()), spec.rules]
print(json.dumps(out))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "single": [[1, 1, 1, 1], []],
        "data_parallel": [[1, -1, 1, 1], []],
        "fsdp": [[1, 1, -1, 1], []],
        "tensor_parallel": [[1, 1, 1, -1], []],
        "expert_parallel": [[-1, 1, 1, 1], []],
        "product": [[1, -1, 4, 1], [["adapter", ["tensor"]]]],
    }
