"""Plans: bytes as JAX puts them on devices, FLOPs as counted by hand, fleets by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from elm_jax.checkpoints.backbone import initialize, save_backbone
from elm_jax.cli.main import main
from elm_jax.errors import ElmError
from elm_jax.experts.apply import backbone_shapes, count_expert_parameters
from elm_jax.experts.tree import count_parameters, flatten
from elm_jax.models import AdapterSpec, T5Config, get_spec
from elm_jax.models.sizes import SIZES, get_config
from elm_jax.training import OptimizerSpec
from elm_jax.training.planning import (
    DEVICES,
    Device,
    Fleet,
    Layout,
    Workload,
    activation_bytes,
    get_device,
    parse_bytes,
    plan_fleet,
    plan_layout,
    step_flops,
)
from elm_jax.training.program import abstract_batch, abstract_keys, build_program
from elm_jax.training.sharding import MeshSpec, abstract_mesh

CONFIG = T5Config(24, 16, 4, 4, 24, 2, 1, dropout_rate=0.0)
ONE = abstract_mesh(MeshSpec.parse("single"))

CASES = [
    # label, mesh, expert, optimizer, changes of the config, dtype of the weights
    ("data", "data=8", "adapter", "adamw", {}, "bfloat16"),
    ("fsdp", "fsdp=8", "lora", "adamw", {}, "float32"),
    ("tensor", "tensor=4,data=2", "adapter", "adafactor", {"scan_layers": True}, "bfloat16"),
    ("full", "expert=2,fsdp=2,tensor=2", "full", "adafactor", {}, "float32"),
    ("int8", "fsdp=4,data=2", "elm_code", "adamw", {"quantization": "int8"}, "bfloat16"),
]
# Runs where eight devices are forced: puts everything on them, and adds up what each holds.
PROGRAM = f"""
import json, jax, jax.numpy as jnp
from elm_jax.models import T5Config, get_spec
from elm_jax.training import *
from elm_jax.training.planning import Workload, _program, abstract_keys, stored_backbone
from elm_jax.training.sharding import make_mesh

def held(tree):
    totals = {{device: 0 for device in jax.devices()}}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            totals[shard.device] += shard.data.nbytes
    return sorted(set(totals.values()))

out = {{}}
for label, mesh, kind, optimizer, changes, dtype in {CASES}:
    config = T5Config(**{dataclasses.asdict(CONFIG)}).replace(**changes)
    work = Workload(config, get_spec(kind), 2, 8, 8, 8,
                    optimizer=OptimizerSpec(name=optimizer), weights_dtype=dtype)
    program = _program(work, make_mesh(MeshSpec.parse(mesh)))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), stored_backbone(work))
    backbone = jax.device_put(zeros, program.backbone)
    state = program.jit_initial_state()(jax.random.split(jax.random.key(0), 2))
    out[label] = dict(backbone=held(backbone), expert=held(state.expert),
                      state=held((state.opt_state, state.step)))
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def on_devices() -> dict:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_bytes_are_those_on_the_devices(on_devices: dict, case: tuple) -> None:
    label, mesh, kind, optimizer, changes, dtype = case
    work = Workload(
        CONFIG.replace(**changes), get_spec(kind), 2, 8, 8, 8,
        optimizer=OptimizerSpec(name=optimizer), weights_dtype=dtype,
    )  # fmt: skip
    layout = plan_layout(work, abstract_mesh(MeshSpec.parse(mesh)))
    groups = {"backbone": "backbone", "expert": "expert", "optimizer state": "state"}
    for group, name in groups.items():
        assert [layout.group_bytes(group)[1]] == on_devices[label][name]


@pytest.mark.parametrize("name", [name for name in SIZES if name.endswith("_xxl")])
def test_published_sizes_have_a_layout(name: str) -> None:
    config = get_config(name, scan_layers=True)
    mesh = abstract_mesh(MeshSpec(data=2, fsdp=8, expert=2))
    program = build_program(config, get_spec("lora"), 2, mesh)
    shapes, placed = flatten(backbone_shapes(config)), flatten(program.backbone)
    held = sum(math.prod(placed[path].shard_shape(leaf.shape)) for path, leaf in shapes.items())
    assert 1 / 8 <= held / count_parameters(backbone_shapes(config)) < 0.126


def xxl(mesh: str, **changes: object) -> Layout:
    config = get_config("t5_1_1_xxl", dtype="bfloat16", remat="full", scan_layers=True)
    work = Workload(config, get_spec("adapter"), 8, weights_dtype="bfloat16", **changes)
    return plan_layout(work, abstract_mesh(MeshSpec.parse(mesh)))


def test_whether_xxl_with_eight_experts_fits_four_devices() -> None:
    alone, shared = xxl("single", batch_size=4), xxl("fsdp=4", batch_size=4)
    # 11.1 G parameters in bfloat16, norms and position biases in float32
    assert alone.group_bytes("backbone")[0] == pytest.approx(2 * 11_135_332_352, rel=1e-4)
    assert shared.group_bytes("backbone")[1] * 4 == pytest.approx(
        alone.group_bytes("backbone")[1], rel=1e-5
    )
    assert shared.total < 0.9 * 80e9 < xxl("fsdp=4", batch_size=256).total
    # Moments are two copies of the expert, in float32, and gradients one.
    sizes = shared.device_bytes()
    experts = 8 * 4 * count_expert_parameters(get_config("t5_1_1_xxl"), AdapterSpec())
    assert sizes["expert"] == sizes["gradients"] == experts // 4
    assert sizes["optimizer state"] == pytest.approx(2 * experts // 4, rel=1e-6)


def test_activations_are_shared_out() -> None:
    def kept(mesh: str, remat: str = "none", **changes: object) -> int:
        config = CONFIG.replace(remat=remat, num_encoder_layers=4, num_decoder_layers=3)
        work = Workload(config, get_spec("adapter"), 2, **{"batch_size": 8, **changes})
        return activation_bytes(work, abstract_mesh(MeshSpec.parse(mesh)))[0]

    whole = kept("single")
    assert kept("data=4") == pytest.approx(whole / 4, rel=0.01)
    assert kept("fsdp=4") == kept("data=4")
    assert kept("expert=2") == whole / 2
    assert whole / 4 < kept("tensor=4") < whole  # the residual stream is on every device
    assert kept("single", accumulation=2) == pytest.approx(whole / 2, rel=0.01)
    assert kept("single", "full") < kept("single", "minimal") < whole


def test_activations_bound_what_xla_sets_aside() -> None:
    config = T5Config(64, 64, 4, 16, 128, 3, 3, scan_layers=True, dropout_rate=0.1)
    work = Workload(config, get_spec("lora"), 1, 8, 64, 32)
    layout = plan_layout(work, ONE)
    program = build_program(config, work.spec, 1, ONE)
    step = jax.jit(program.step, donate_argnums=0).lower(
        program.shapes, backbone_shapes(config), abstract_keys(1), abstract_batch(1, 8, 64, 32)
    )
    temporary = step.compile().memory_analysis().temp_size_in_bytes
    assert 0.5 * temporary < layout.activations + layout.working < 2 * temporary


def matmul_flops(work: Workload) -> float:
    """Products of one step, by hand: forward, and backward towards the activations alone."""
    c, spec = work.config, work.spec
    joined, gates = c.num_heads * c.head_dim, len(c.mlp_activations)
    rows, t, u = work.batch_size, work.inputs_length, work.targets_length
    d, f, e = c.emb_dim, c.mlp_dim, spec.bottleneck

    def attention(queries: int, keys: int) -> tuple[int, int]:
        """Products with kernels, and of activations with each other."""
        return 2 * d * joined * (queries + keys) * 2, 2 * 2 * queries * keys * joined

    mlp = (gates + 1) * 2 * d * f
    adapter = 2 * 2 * d * e
    encoder, mixed = attention(t, t)
    # No gradient goes below the first adapter: the first layer's self-attention has none.
    total = c.num_encoder_layers * (encoder + mixed + mlp * t + adapter * t)
    total += (c.num_encoder_layers - 1) * (encoder + 2 * mixed + mlp * t + 2 * adapter * t)
    total += mlp * 0 + 2 * adapter * t - adapter // 2 * t
    itself, own = attention(u, u)
    cross, across = attention(u, t)
    layers = c.num_decoder_layers
    total += layers * (itself + own + cross + across + mlp * u + adapter * u)
    total += layers * (cross + 2 * across + mlp * u + 2 * adapter * u)
    total += (layers - 1) * (itself + 2 * own)
    total += 2 * 2 * d * c.vocab_size * u
    return rows * total


def test_flops_are_those_of_the_products_by_hand() -> None:
    config = T5Config(64, 512, 8, 64, 1024, 3, 2, dropout_rate=0.0)
    work = Workload(config, AdapterSpec(bottleneck=64), 1, 2, 512, 128)
    assert step_flops(work) == pytest.approx(matmul_flops(work), rel=0.06)


def test_frozen_backbones_cost_two_thirds_of_trained_ones() -> None:
    config = T5Config(64, 256, 4, 64, 512, 2, 2, dropout_rate=0.0)
    frozen = step_flops(Workload(config, AdapterSpec(bottleneck=1), 1, 4, 64, 64))
    trained = step_flops(Workload(config, get_spec("full"), 1, 4, 64, 64))
    assert 0.55 < frozen / trained < 0.7


def test_flops_carried_on_over_layers_are_those_of_all_layers() -> None:
    config = CONFIG.replace(num_encoder_layers=4, num_decoder_layers=3)
    # Ways to run it do not change what the model computes.
    run_as = config.replace(scan_layers=True, remat="full", attention="memory_efficient")
    work = Workload(run_as, get_spec("lora"), 3, 4, 8, 6, accumulation=2)
    program = build_program(config.replace(attention="plain"), work.spec, 1, ONE)
    lowered = jax.jit(program.step).lower(
        program.shapes, backbone_shapes(config), abstract_keys(1), abstract_batch(1, 4, 8, 6)
    )
    assert step_flops(work) == lowered.cost_analysis()["flops"]


def test_fleet_by_hand() -> None:
    work = Workload(CONFIG, get_spec("adapter"), 4, 8, 8, 8)
    mesh = abstract_mesh(MeshSpec.parse("data=2,expert=2"))
    device = Device("toy", flops=1e6, memory=1e9, bandwidth=1e12, source="invented")
    fleet = Fleet(experts=10, examples_per_expert=100, epochs=2, at_once=2)
    plan = plan_fleet(work, fleet, mesh, device, utilisation=0.5, price=2.0)
    steps = 25  # 200 examples in batches of 8
    assert (plan.steps, plan.runs, plan.devices, plan.bound) == (steps, 3, 4, "compute")
    assert plan.seconds_per_step == 4 * step_flops(work) / (4 * 1e6 * 0.5)
    assert plan.flops == 10 * steps * step_flops(work)
    assert plan.tokens == 10 * steps * 8 * 16
    assert plan.hours == pytest.approx(2 * steps * plan.seconds_per_step / 3600)  # two of the three
    assert plan.device_hours == pytest.approx(10 / 4 * steps * plan.seconds_per_step * 4 / 3600)
    assert plan.cost == pytest.approx(2 * plan.device_hours)
    assert plan.store_bytes == 4 * 10 * plan.expert_parameters
    assert plan.memory == plan_layout(work, mesh).total
    slow = dataclasses.replace(device, flops=1e15, bandwidth=1e3)
    plan = plan_fleet(work, fleet, mesh, slow)
    assert plan.bound == "memory bandwidth"
    assert plan.seconds_per_step == pytest.approx(plan.step_bytes / 1e3)
    assert plan_fleet(work, Fleet(train_steps=7), mesh, device).steps == 7


def test_devices_and_sizes() -> None:
    assert get_device("h100").memory == 80e9 and get_device("v5e").flops == 197e12
    assert all(d.source and d.flops > 1e13 and d.bandwidth > 5e11 for d in DEVICES.values())
    with pytest.raises(ElmError, match="unknown device 'v5ee' .did you mean 'v5e'"):
        get_device("v5ee")
    assert parse_bytes("80GB") == 80 * 10**9 and parse_bytes("16 GiB") == 2**34
    for text in ("80", "GB", "1.2.3GB", "80GX"):
        with pytest.raises(ElmError, match="expected a size such as 80GB"):
            parse_bytes(text)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Workload(CONFIG, get_spec("lora"), 0), "experts_per_step must be at least 1"),
        (lambda: Workload(CONFIG, get_spec("lora"), accumulation=3), "not divisible by accumula"),
        (lambda: Workload(CONFIG, get_spec("lora"), weights_dtype="int8"), "weights_dtype must be"),
        (lambda: Fleet(experts=0), "experts must be at least 1"),
        (lambda: Fleet(train_steps=0), "train_steps must be at least 1"),
        (
            lambda: plan_layout(
                Workload(CONFIG, get_spec("lora"), 3), abstract_mesh(MeshSpec(data=1, expert=2))
            ),
            "a stack of experts of size 3 cannot be split 2 ways",
        ),
        (
            lambda: plan_fleet(
                Workload(CONFIG, get_spec("lora")), Fleet(), ONE, DEVICES["v4"], utilisation=40
            ),
            r"utilisation must be in \(0, 1\], got 40",
        ),
    ],
)
def test_mistakes(make: object, said: str) -> None:
    with pytest.raises(ElmError, match=said):
        make()


def test_notes_on_what_divides_badly() -> None:
    work = Workload(CONFIG, get_spec("lora"), batch_size=8, accumulation=4)
    layout = plan_layout(work, abstract_mesh(MeshSpec.parse("tensor=8,data=4")))
    heads, rows = layout.notes
    assert "4 heads are not divided 8 ways" in heads
    assert "microbatches of 2 rows are not divided 4 ways" in rows
    assert math.prod(layout.mesh.values()) == 32


XXL = ["--size", "xxl", "--stack", "8", "--remat", "full", "--scan-layers", "--device-memory"]


def test_command_answers_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["explain-sharding", *XXL, "80GB", "--mesh", "fsdp=4"]
    assert main([*command, "--batch-size", "4"]) == 0
    said = capsys.readouterr().out
    assert "fits: yes" in said and "25.0% on each device" in said
    # 4096 / 4 x 24 layers x 10240 in bfloat16, on each device
    [row] = [line for line in said.splitlines() if " encoder/encoder/mlp/wi_0/kernel" in line]
    assert "fsdp" in row and row.endswith(f"{4096 // 4 * 24 * 10240 * 2:,}")
    assert main([*command, "--batch-size", "256", "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is False and told["devices"] == 4
    assert told["device_bytes"]["total"] > 0.9 * told["device_memory"] == 0.9 * 80e9
    assert (
        sum(row["device_bytes"] for row in told["arrays"] if row["group"] == "backbone")
        == (told["device_bytes"]["backbone"])
    )


def test_command_reads_a_folder_without_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_backbone(initialize(CONFIG, 0), tmp_path / "own")
    assert main(["explain-sharding", "--backbone", str(folder), "--batch-size", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["device_bytes"]["backbone"] == 4 * count_parameters(backbone_shapes(CONFIG))


def test_command_plans_a_fleet(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--experts", "296", "--mesh", "data=8,fsdp=4", "--device", "v5e"]
    command += ["--steps", "100", "--utilisation", "0.5", "--price-per-device-hour", "1.2"]
    assert main([*command, "--size", "xl", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    seconds = told["step_flops"] / (32 * 197e12 * 0.5)
    assert told["bound"] == "compute" and told["seconds_per_step"] == pytest.approx(seconds)
    assert told["parameters"] == 2_849_757_184  # T5 1.1 XL
    assert told["device_hours"] == pytest.approx(296 * 100 * seconds * 32 / 3600)
    assert told["cost"] == pytest.approx(1.2 * told["device_hours"])
    assert main([*command, "--backbone", "elm-tiny", "--batch-size", "65536"]) == 0
    said = capsys.readouterr().out
    assert "float32 is slower" in said and "a device needs" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "--size", "t5_1_1_xxxl"], "did you mean 't5_1_1_xxl'?"),
        (["plan", "--size", "small", "--device", "h10"], "(did you mean 'h100'?)"),
        (["plan", "--mesh", "fsdp=3", "--device", "v4"], "a batch of size 32 cannot be split 3"),
        (["explain-sharding", "--mesh", "fsdp=3", "--devices", "8"], "does not fit 8 devices"),
        (["explain-sharding", "--device-memory", "80"], "expected a size such as 80GB"),
        (["explain-sharding", "--rule", "adaptr=fsdp"], "(did you mean 'adapter'?)"),
        (["explain-sharding", "--dtype", "f16"], "T5Config.dtype must be one of"),
        (["explain-sharding", "--backbone", "./no/such/folder"], "no such backbone folder"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1
