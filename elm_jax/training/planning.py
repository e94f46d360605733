"""What training would take, worked out before anything is allocated: memory, FLOPs, hours, cost.

Everything comes from the code that trains: layouts from the shapes and rules of the run's own
program, FLOPs from XLA's analysis of its step, activations from what its backward pass keeps.
Sizes with many layers are traced with one and two layers and carried on, which is exact, as the
layers of a stack are alike. No device, weight or compilation is needed, so a laptop can answer for
T5-XXL on a pod.
Shapes: B batch, T encoder tokens, U decoder tokens, X experts stacked, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Var
from jax.sharding import NamedSharding, PartitionSpec

from elm_jax.checkpoints.loading import storage_dtype
from elm_jax.errors import ElmError, nearest
from elm_jax.experts.apply import backbone_shapes, count_expert_parameters, expert_shapes
from elm_jax.experts.tree import Tree, count_parameters, flatten, unflatten
from elm_jax.models import T5, ExpertSpec, FullSpec, T5Config
from elm_jax.models.config import DTYPES
from elm_jax.training.optimizers import OptimizerSpec
from elm_jax.training.program import Program, abstract_batch, abstract_keys, build_program
from elm_jax.training.sharding import (
    RULES,
    AnyMesh,
    LogicalRules,
    MeshSpec,
    abstract_mesh,
    check_work,
)
from elm_jax.training.step import LossSpec, loss_and_metrics


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is trained: X experts at a time over a backbone.

    Attributes:
      config: the backbone's, and the ways in which it is run.
      spec: what the experts are made of.
      experts_per_step: X.
      batch_size: B, rows per expert.
      inputs_length: T.
      targets_length: U.
      accumulation: microbatches per step.
      optimizer: of each expert.
      weights_dtype: of the frozen backbone, 'float32' or 'bfloat16'.
    """

    config: T5Config
    spec: ExpertSpec
    experts_per_step: int = 1
    batch_size: int = 32
    inputs_length: int = 512
    targets_length: int = 128
    accumulation: int = 1
    optimizer: OptimizerSpec = dataclasses.field(default_factory=OptimizerSpec)
    weights_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ElmError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.accumulation:
            raise ElmError(
                f"batch size {self.batch_size} is not divisible by accumulation {self.accumulation}"
            )
        if self.weights_dtype not in DTYPES:
            raise ElmError(
                f"weights_dtype must be one of {', '.join(DTYPES)}, got {self.weights_dtype!r}"
            )

    @property
    def tokens(self) -> int:
        """Tokens of one expert's batch, padding included."""
        return self.batch_size * (self.inputs_length + self.targets_length)


_COUNTS = ("experts_per_step", "batch_size", "inputs_length", "targets_length", "accumulation")


@dataclasses.dataclass(frozen=True)
class ArrayLayout:
    """One array and what a device holds of it.

    Attributes:
      group: 'backbone', 'expert' or 'optimizer state'.
      path: its name in the group.
      shape: of the whole array, the stack's axis included.
      dtype: its name.
      spec: mesh axes of each axis.
      bytes: of the whole array.
      device_bytes: on each device; equal for all, as sizes must divide.
    """

    group: str
    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    bytes: int
    device_bytes: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where everything lies, and the bytes that a device needs.

    Attributes:
      mesh: size of each mesh axis.
      arrays: every array of backbone, expert and optimizer state.
      gradients: bytes of an expert's gradients on a device.
      batch: bytes of the batches in flight on a device.
      activations: estimated bytes kept from forward to backward pass on a device.
      working: estimated bytes of what exists for a moment: a backbone's kernels gathered over
        `fsdp`, casts of them, and the largest product.
      notes: what a user should know of this layout.
    """

    mesh: Mapping[str, int]
    arrays: tuple[ArrayLayout, ...]
    gradients: int
    batch: int
    activations: int
    working: int
    notes: tuple[str, ...] = ()

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        return math.prod(self.mesh.values())

    def group_bytes(self, group: str) -> tuple[int, int]:
        """Returns the bytes of a group of arrays: whole, and on each device."""
        rows = [row for row in self.arrays if row.group == group]
        return sum(row.bytes for row in rows), sum(row.device_bytes for row in rows)

    def device_bytes(self) -> dict[str, int]:
        """Returns the bytes on each device by what they are for; the last two are estimates."""
        exact = {group: self.group_bytes(group)[1] for group in GROUPS}
        return exact | {
            "gradients": self.gradients,
            "batch": self.batch,
            "activations": self.activations,
            "working": self.working,
        }

    @property
    def total(self) -> int:
        """Bytes that a device needs at most."""
        return sum(self.device_bytes().values())


GROUPS = ("backbone", "expert", "optimizer state")
BATCHES_IN_FLIGHT = 3
"""Batches on a device: the one in work, and those that the loop makes ahead."""


def plan_layout(work: Workload, mesh: AnyMesh, rules: LogicalRules = RULES) -> Layout:
    """Works out where each array of a run lies, and what a device needs.

    The arrays' bytes are what JAX puts on each device. Activations and working memory are
    estimates, see `activation_bytes`.

    Args:
      work: what is trained.
      mesh: where; an abstract one will do.
      rules: logical axis -> mesh axes.

    Raises:
      ElmError: for an array that no rule covers, or a size that the mesh does not divide.
    """
    config = work.config
    check_work(mesh, work.experts_per_step, work.batch_size, rules)
    program = _program(work, mesh, rules)
    backbone = stored_backbone(work)
    arrays = [
        *_rows("backbone", backbone, program.backbone),
        *_rows("expert", program.shapes.expert, program.state.expert),
        *_rows("optimizer state", program.shapes.opt_state, program.state.opt_state),
    ]
    arrays.append(_row("optimizer state", "step", program.shapes.step, program.state.step))
    expert = sum(row.device_bytes for row in arrays if row.group == "expert")
    batch = abstract_batch(
        work.experts_per_step, work.batch_size, work.inputs_length, work.targets_length
    )
    one_batch = sum(_device_bytes(leaf, program.batch) for leaf in batch.values())
    activations, largest = activation_bytes(work, mesh, rules)
    notes = []
    ways = math.prod(mesh.shape[axis] for axis in dict(rules)["joined_kv"])
    if config.num_heads % ways:
        notes.append(
            f"{config.num_heads} heads are not divided {ways} ways: attention is gathered on "
            "every device"
        )
    microbatch = work.batch_size // work.accumulation
    ways = math.prod(mesh.shape[axis] for axis in dict(rules)["batch"])
    if microbatch % ways:
        notes.append(f"microbatches of {microbatch} rows are not divided {ways} ways")
    return Layout(
        dict(mesh.shape),
        tuple(arrays),
        gradients=expert,
        batch=BATCHES_IN_FLIGHT * one_batch,
        activations=activations,
        working=largest + _weights_in_work(work, backbone, program.backbone),
        notes=tuple(notes),
    )


def _program(work: Workload, mesh: AnyMesh, rules: LogicalRules = RULES) -> Program:
    return build_program(
        work.config,
        work.spec,
        work.experts_per_step,
        mesh,
        optimizer=work.optimizer,
        accumulation=work.accumulation,
        rules=rules,
    )


def stored_backbone(work: Workload) -> Tree:
    """Returns the backbone's ShapeDtypeStructs as it is loaded."""

    def stored(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        quantized = leaf.dtype == jnp.int8 or path.endswith("/kernel_scale")
        dtype = leaf.dtype if quantized else storage_dtype(path, leaf.dtype, work.weights_dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    shapes = flatten(backbone_shapes(work.config))
    return unflatten({path: stored(path, leaf) for path, leaf in shapes.items()})


def _rows(group: str, shapes: Any, placed: Any) -> list[ArrayLayout]:
    pairs = zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(placed), strict=True)
    return [
        _row(group, jax.tree_util.keystr(path, simple=True, separator="/"), leaf, sharding)
        for (path, leaf), sharding in pairs
    ]


def _row(group: str, path: str, leaf: Any, sharding: Any) -> ArrayLayout:
    return ArrayLayout(
        group,
        path,
        tuple(leaf.shape),
        leaf.dtype.name,
        sharding.spec,
        math.prod(leaf.shape) * leaf.dtype.itemsize,
        _device_bytes(leaf, sharding),
    )


def _device_bytes(leaf: Any, sharding: NamedSharding) -> int:
    return math.prod(sharding.shard_shape(tuple(leaf.shape))) * leaf.dtype.itemsize


def _weights_in_work(work: Workload, backbone: Tree, placed: Tree) -> int:
    """Estimates the bytes of weights that a device makes beside those that it holds.

    A kernel split over `fsdp` is gathered where it is used, one in use and the next on its way; a
    kernel of another dtype than the computation's is cast, and as the backward pass needs it
    again, kept; a full expert's weights are added to the backbone's, for each expert.
    """
    shardings = jax.tree.leaves(placed)
    rows = _rows("backbone", backbone, placed)
    fsdp = shardings[0].mesh.shape["fsdp"]
    split = [row.device_bytes * fsdp for row in rows if "fsdp" in str(row.spec)]
    total = 2 * max(split) if fsdp > 1 else 0
    if isinstance(work.spec, FullSpec):
        experts = work.experts_per_step // shardings[0].mesh.shape["expert"]
        total += experts * sum(row.device_bytes for row in rows)
    elif work.config.quantization is None:
        kernels = [row for row in rows if row.path.endswith("/kernel")]
        other = [row for row in kernels if row.dtype != work.config.dtype]
        size = work.config.compute_dtype.itemsize
        total += sum(row.device_bytes // np.dtype(row.dtype).itemsize * size for row in other)
    return total


def activation_bytes(work: Workload, mesh: AnyMesh, rules: LogicalRules = RULES) -> tuple[int, int]:
    """Estimates what a device keeps from forward to backward pass, and what it needs in between.

    Counted are the arrays that JAX's backward pass keeps (with the config's `remat` and
    `attention`, resolved on this machine), of the model that one device runs: its share of rows,
    experts, heads, feed-forward and vocabulary. XLA makes do with less than that, as it merges
    arrays and computes cheap ones again.

    Returns:
      Bytes kept; and bytes needed for a moment, which are the largest array kept and, where blocks
      are computed again, all that one block keeps.
    """
    known = dict(rules)

    def ways(logical: str) -> int:
        return math.prod(mesh.shape[axis] for axis in known[logical])

    config = work.config
    local = config.replace(
        num_heads=-(-config.num_heads // ways("joined_kv")),
        mlp_dim=-(-config.mlp_dim // ways("mlp")),
        vocab_size=-(-config.vocab_size // ways("vocab")),
        scan_layers=False,
        quantization=None,
    )
    rows = -(-work.batch_size // (work.accumulation * ways("batch")))
    experts = work.experts_per_step // ways("experts")

    def kept(changed: T5Config) -> np.ndarray:
        spec = None if isinstance(work.spec, FullSpec) else work.spec
        sizes = _residuals(changed, spec, rows, work.inputs_length, work.targets_length)
        return np.array([sum(sizes), max(sizes)])

    total, _ = _over_layers(kept, local)
    block, largest = kept(_with_layers(local.replace(remat="none"), 1, 1))
    once = largest + (block if config.remat != "none" else 0)
    return int(experts * total), int(experts * once)


@functools.lru_cache(maxsize=64)
def _residuals(
    config: T5Config, spec: ExpertSpec | None, rows: int, inputs_length: int, targets_length: int
) -> tuple[int, ...]:
    """Returns the bytes of each array that the backward pass of one expert keeps, weights aside.

    A full expert (spec None) is the backbone itself.
    """
    model = T5(config, spec)
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        for name, leaf in abstract_batch(1, rows, inputs_length, targets_length).items()
    }
    backbone = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, config.compute_dtype),
        backbone_shapes(config),
    )

    def backward(expert: Tree, backbone: Tree, batch: Tree, key: jax.Array) -> Any:
        def loss(trained: Tree) -> Any:
            arrays, frozen = (trained, backbone) if spec is not None else (None, trained)
            return loss_and_metrics(model, spec, LossSpec(), arrays, frozen, batch, key)  # type: ignore[arg-type]

        return jax.vjp(loss, expert, has_aux=True)[1]

    expert = backbone if spec is None else expert_shapes(config, spec)
    key = jax.ShapeDtypeStruct((), abstract_keys(1).dtype)
    traced = jax.make_jaxpr(backward)(expert, backbone, batch, key).jaxpr
    given = set(traced.invars)
    kept = {v: v.aval for v in traced.outvars if isinstance(v, Var) and v not in given}
    return tuple(math.prod(a.shape) * a.dtype.itemsize for a in kept.values())  # type: ignore[attr-defined]


def _with_layers(config: T5Config, encoder: int, decoder: int) -> T5Config:
    return config.replace(num_encoder_layers=encoder, num_decoder_layers=decoder)


def _over_layers(measure: Callable[[T5Config], np.ndarray], config: T5Config) -> np.ndarray:
    """Carries a sum over layers on from the first two of each stack.

    The first layer may differ from the others (nothing below it is trained); these are alike.
    """
    one = measure(_with_layers(config, 1, 1))
    more = one
    for layers, two in ((config.num_encoder_layers, (2, 1)), (config.num_decoder_layers, (1, 2))):
        if layers > 1:
            more = more + (layers - 1) * (measure(_with_layers(config, *two)) - one)
    return more


def step_flops(work: Workload) -> float:
    """Returns the FLOPs of one optimizer step of one expert, forward and backward.

    XLA counts them (2 for a multiply-add) in the step that training compiles, before optimisation.
    Of a frozen matrix, the backward pass has the product that carries the gradient on, but none for
    the matrix itself. What `remat` computes again is not counted, so that utilisations are of the
    model's FLOPs (MFU).
    """
    config = work.config.replace(scan_layers=False, remat="none", attention="plain")

    def flops(changed: T5Config) -> np.ndarray:
        one = dataclasses.replace(work, config=changed, experts_per_step=1, accumulation=1)
        program = _program(one, abstract_mesh(MeshSpec(data=1)))
        batch = abstract_batch(1, one.batch_size, one.inputs_length, one.targets_length)
        step = jax.jit(program.step)
        lowered = step.lower(program.shapes, stored_backbone(one), abstract_keys(1), batch)
        cost: Any = lowered.cost_analysis()
        return np.array(cost["flops"])

    return float(_over_layers(flops, config))


@dataclasses.dataclass(frozen=True)
class Device:
    """An accelerator, by its published numbers.

    Attributes:
      name: as users call it.
      flops: peak, bfloat16 with float32 sums, without sparsity, per second.
      memory: bytes.
      bandwidth: of its memory, bytes per second.
      source: where the numbers are from.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    source: str


def _tpu(name: str, teraflops: float, gigabytes: int, bandwidth: float) -> Device:
    source = f"Google Cloud documentation, TPU {name}, per chip"
    return Device(name, teraflops * 1e12, gigabytes * 1e9, bandwidth * 1e9, source)


def _gpu(name: str, teraflops: float, gigabytes: int, bandwidth: float, sheet: str) -> Device:
    source = f"NVIDIA, {sheet} datasheet, SXM, dense"
    return Device(name, teraflops * 1e12, gigabytes * 1e9, bandwidth * 1e9, source)


DEVICES = {
    device.name: device
    for device in (
        _tpu("v4", 275, 32, 1228),
        _tpu("v5e", 197, 16, 819),
        _tpu("v5p", 459, 95, 2765),
        _tpu("v6e", 918, 32, 1640),
        _gpu("a100-40gb", 312, 40, 1555, "A100"),
        _gpu("a100", 312, 80, 2039, "A100 80GB"),
        _gpu("h100", 989.4, 80, 3350, "H100"),
        _gpu("h200", 989.4, 141, 4800, "H200"),
    )
}
"""Accelerators that a run can be planned for, besides 'cpu', which is measured."""


def get_device(name: str, dtype: str = "bfloat16") -> Device:
    """Returns a device of `DEVICES`, or 'cpu': this machine's processors, measured in seconds.

    Args:
      name: of the device.
      dtype: of the products that 'cpu' is measured with.

    Raises:
      ElmError: for an unknown name, with the nearest.
    """
    if name == "cpu":
        return measure_cpu(dtype)
    if name not in DEVICES:
        known = (*DEVICES, "cpu")
        raise ElmError(f"unknown device {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return DEVICES[name]


def measure_cpu(dtype: str = "float32", *, repeats: int = 5) -> Device:
    """Measures the processors of this machine: the rate of large products, and of a copy.

    Args:
      dtype: of the products.
      repeats: of each; the best counts.
    """
    cpu = jax.devices("cpu")[0]

    def best(function: Callable[..., Any], *arrays: Any) -> float:
        run = jax.jit(function)
        jax.block_until_ready(run(*arrays))
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(run(*arrays))
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    size, length = 2048, 2**25
    with jax.default_device(cpu):
        matrix = jnp.ones((size, size), dtype)
        flops = 2 * size**3 / best(jnp.matmul, matrix, matrix)
        bandwidth = 2 * 4 * length / best(lambda x: x + 1, jnp.ones(length, jnp.float32))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device("cpu", flops, memory, bandwidth, f"measured here, {dtype} products")


_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """Reads a size such as 80GB (10^9) or 16GiB (2^30).

    >>> parse_bytes('80GB'), parse_bytes('0.5 GiB')
    (80000000000, 536870912)
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]+)\s*", text)
    if found is None or found[2].upper() not in _UNITS or found[1].count(".") > 1:
        raise ElmError(f"expected a size such as 80GB or 16GiB, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2].upper()])


@dataclasses.dataclass(frozen=True)
class Fleet:
    """How many experts are trained, and for how long each.

    Attributes:
      experts: in all.
      examples_per_expert: of which each is seen `epochs` times.
      epochs: passes over the examples.
      train_steps: optimizer steps of an expert; None follows from examples and epochs.
      at_once: runs that go at the same time, each on a mesh of its own.
    """

    experts: int = 1
    examples_per_expert: int = 50_000
    epochs: int = 5
    train_steps: int | None = None
    at_once: int = 1

    def __post_init__(self) -> None:
        for name in ("experts", "examples_per_expert", "epochs", "at_once"):
            if getattr(self, name) < 1:
                raise ElmError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.train_steps is not None and self.train_steps < 1:
            raise ElmError(f"train_steps must be at least 1, got {self.train_steps}")

    def steps(self, batch_size: int) -> int:
        """Returns the optimizer steps of an expert, as training counts them."""
        if self.train_steps is not None:
            return self.train_steps
        return max(1, -(-self.epochs * self.examples_per_expert // batch_size))


@dataclasses.dataclass(frozen=True)
class FleetPlan:
    """What a fleet takes.

    Attributes:
      parameters: of the backbone.
      expert_parameters: of one expert.
      devices: of one run's mesh.
      device: their kind.
      memory: bytes that a device needs.
      steps: optimizer steps of an expert.
      runs: stacks of experts.
      step_flops: of one expert's step.
      step_bytes: that one step of a stack reads and writes in each device's memory, at least.
      flops: of the fleet.
      tokens: of the fleet, padding included.
      seconds_per_step: of one stack.
      bound: 'compute' or 'memory bandwidth', whichever takes longer.
      hours: from start to end.
      device_hours: devices times hours in which they work.
      store_bytes: of the experts' arrays on disk.
      cost: at the price given, or None.
    """

    parameters: int
    expert_parameters: int
    devices: int
    device: str
    memory: int
    steps: int
    runs: int
    step_flops: float
    step_bytes: int
    flops: float
    tokens: int
    seconds_per_step: float
    bound: str
    hours: float
    device_hours: float
    store_bytes: int
    cost: float | None


def plan_fleet(
    work: Workload,
    fleet: Fleet,
    mesh: AnyMesh,
    device: Device,
    *,
    utilisation: float = 0.4,
    price: float | None = None,
    rules: LogicalRules = RULES,
) -> FleetPlan:
    """Works out what a fleet of experts takes.

    A step takes as long as its FLOPs at the given share of the devices' peak, or, if that is
    longer, as reading the weights in forward and backward pass, writing and reading activations,
    and updating the state takes at the bandwidth of their memory. Communication, start and input
    are in the utilisation.

    Args:
      work: a step.
      fleet: how many experts, for how long.
      mesh: of one run.
      device: what it is made of.
      utilisation: share of the peak that the model's FLOPs reach (MFU), in (0, 1].
      price: of a device for an hour.
      rules: logical axis -> mesh axes.

    Raises:
      ElmError: for a utilisation out of range, or what `plan_layout` refuses.
    """
    if not 0 < utilisation <= 1:
        raise ElmError(f"utilisation must be in (0, 1], got {utilisation}")
    if price is not None and not 0 <= price < math.inf:
        raise ElmError(f"the price of a device hour must not be negative, got {price}")
    layout = plan_layout(work, mesh, rules)
    flops = step_flops(work)
    stack = work.experts_per_step
    bytes_ = layout.device_bytes()
    state = bytes_["expert"] + bytes_["optimizer state"]
    traffic = (
        2 * work.accumulation * (bytes_["backbone"] + bytes_["activations"])
        + 2 * state
        + 2 * bytes_["gradients"]
    )
    compute = flops * stack / (layout.devices * device.flops * utilisation)
    reading = traffic / device.bandwidth
    seconds = max(compute, reading)
    steps = fleet.steps(work.batch_size)
    runs = -(-fleet.experts // stack)
    device_hours = seconds * steps * fleet.experts / stack * layout.devices / 3600
    parameters = count_expert_parameters(work.config, work.spec)
    return FleetPlan(
        parameters=count_parameters(backbone_shapes(work.config)),
        expert_parameters=parameters,
        devices=layout.devices,
        device=device.name,
        memory=layout.total,
        steps=steps,
        runs=runs,
        step_flops=flops,
        step_bytes=traffic,
        flops=flops * steps * fleet.experts,
        tokens=work.tokens * steps * fleet.experts,
        seconds_per_step=seconds,
        bound="compute" if compute >= reading else "memory bandwidth",
        hours=-(-runs // fleet.at_once) * seconds * steps / 3600,
        device_hours=device_hours,
        store_bytes=4 * parameters * fleet.experts,
        cost=None if price is None else price * device_hours,
    )
