"""Training a stack of experts: state, checkpoints with the data position, metrics, resume."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from elm_jax.errors import ElmError, TrainingDiverged
from elm_jax.experts.apply import backbone_shapes, check_expert
from elm_jax.experts.tree import Tree, check_shapes, checksum, unstack
from elm_jax.models import ExpertSpec, T5Config
from elm_jax.models.scan import from_storage, to_storage
from elm_jax.training import distributed, sharding
from elm_jax.training.metrics import MetricsWriter
from elm_jax.training.optimizers import OptimizerSpec
from elm_jax.training.program import Program, build_program, runs_one_by_one
from elm_jax.training.sharding import RULES, LogicalRules
from elm_jax.training.step import LossSpec, TrainState


class Stream(Protocol):
    """A source of batches in which the batch of a step depends on nothing but the step."""

    def batch_at(self, step: int) -> Mapping[str, np.ndarray]:
        """Returns int32 arrays [B, T] and [B, U] under t5x's names."""
        ...

    def state(self) -> Mapping[str, Any]:
        """Returns JSON facts that decide the batches; a resumed run must have the same."""
        ...


@dataclasses.dataclass(frozen=True)
class Member:
    """One expert of a stack: its id and its own stream of batches."""

    id: str
    stream: Stream


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How a stack is trained.

    Attributes:
      train_steps: optimizer steps.
      optimizer: applied to each expert by itself.
      loss: the training loss.
      accumulation: microbatches per step.
      seed: of initial values and dropout; each expert adds its own id.
      log_every: steps between two records of metrics.
      checkpoint_every: steps between two checkpoints; the last step always has one.
      keep: checkpoints kept.
    """

    train_steps: int
    optimizer: OptimizerSpec = dataclasses.field(default_factory=OptimizerSpec)
    loss: LossSpec = dataclasses.field(default_factory=LossSpec)
    accumulation: int = 1
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("train_steps", "accumulation", "log_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ElmError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ElmError(f"seed must be from 0 to 2**32 - 1, got {self.seed}")

    def identity(self) -> dict[str, Any]:
        """Returns what decides the trained arrays, as JSON."""
        fields = dataclasses.asdict(self)
        return {k: fields[k] for k in ("train_steps", "optimizer", "loss", "accumulation", "seed")}


@dataclasses.dataclass(frozen=True)
class TrainedExpert:
    """The outcome for one member: its arrays (numpy, laid out per layer) and its curve."""

    id: str
    params: Tree
    history: list[dict[str, float]]


Progress = Callable[[int, Mapping[str, float]], None]


def expert_key(seed: int, name: str) -> jax.Array:
    """Returns the random key of an expert, the same in whatever stack it is trained."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()) & 0x7FFFFFFF)


def train_stack(
    config: T5Config,
    params: Tree,
    spec: ExpertSpec,
    members: Sequence[Member],
    run: RunConfig,
    *,
    folder: str | Path,
    initial: Tree | None = None,
    mesh: Mesh | None = None,
    rules: LogicalRules = RULES,
    progress: Progress | None = None,
) -> list[TrainedExpert]:
    """Trains X experts over one frozen backbone, or resumes where a killed run stopped.

    Args:
      config: the backbone's config.
      params: the backbone, laid out as `config.scan_layers` says; never changed, copied into no
        state, never donated.
      spec: what the experts are made of.
      members: X experts; their batches must have one shape.
      run: how to train.
      folder: the run's folder, for checkpoints and metrics; a run that is there is resumed.
      initial: the arrays that every member starts from, as a store holds them; fresh by default.
      mesh: where to run; all devices, data parallel, by default.
      rules: logical axis -> mesh axes, for every array.
      progress: called with the step and run-wide metrics after each record.

    Returns:
      The trained experts in the order of `members`.

    Raises:
      ElmError: if the folder holds a run with other settings or data, or `initial` does not fit.
      TrainingDiverged: if a loss or gradient is not finite; the last good checkpoint stays.
      Preempted: if the run was asked to stop (see `distributed`); a checkpoint is written.
    """
    if len({m.id for m in members}) != len(members) or not members:
        raise ElmError(f"a stack needs members with different ids, got {[m.id for m in members]}")
    mesh = mesh or sharding.make_mesh()
    run_folder = epath.Path(folder).resolve()  # Orbax takes absolute paths only
    program = build_program(
        config,
        spec,
        len(members),
        mesh,
        optimizer=run.optimizer,
        # A constant rate is the same however long the run: runs that differ in that alone share a
        # step.
        train_steps=1 if run.optimizer.schedule == "constant" else run.train_steps,
        loss=run.loss,
        accumulation=run.accumulation,
        one_by_one=runs_one_by_one(mesh, rules),
        rules=rules,
    )
    check_shapes("the backbone", params, backbone_shapes(config))
    params = distributed.put(params, program.backbone)
    keys = jnp.stack([expert_key(run.seed, m.id) for m in members])
    if jax.process_count() > 1:
        data = distributed.put(jax.random.key_data(keys), sharding.replicated(mesh))
        keys = jax.jit(jax.random.wrap_key_data, out_shardings=program.keys)(data)
    step_fn = program.jit_step()
    identity = {
        **run.identity(),
        "config": config.to_json(),
        "spec": str(spec),
        "members": {m.id: dict(m.stream.state()) for m in members},
    }
    if initial is not None:
        identity["initial"] = checksum(initial)
        initial = from_storage(initial, config)
        check_expert("the initial expert", config, spec, initial)
    options = ocp.CheckpointManagerOptions(max_to_keep=run.keep, create=True)
    with (
        distributed.only_run(run_folder),
        contextlib.closing(MetricsWriter(run_folder, write=distributed.is_writer())) as writer,
        ocp.CheckpointManager(run_folder / "checkpoints", options=options) as manager,
    ):
        state = _restore(manager, program.shapes, program.state, identity, run_folder)
        if state is None and initial is not None:
            state = program.jit_state_from()(_stacked(initial, len(members), program))
        elif state is None:
            state = program.jit_initial_state()(keys)
        start = int(state.step)
        writer.resume(start)
        pending: list[dict[str, jax.Array]] = []
        clock = time.perf_counter()
        for step, batch in _batches(members, start, run.train_steps, mesh, rules):
            state, metrics = step_fn(state, params, keys, batch)
            pending.append(metrics)
            stop = step < run.train_steps and distributed.should_stop(step)
            save = stop or step % run.checkpoint_every == 0 or step == run.train_steps
            if save or step % run.log_every == 0:
                done = jax.device_get(pending)  # waits for the steps, so that the clock is true
                now = time.perf_counter()
                saved = manager.latest_step()
                kept = f"that of step {saved} is kept" if saved else "none was written before"
                place = f"{run_folder / 'checkpoints'}: {kept}"
                record = _record(members, step, done, now - clock, place)
                writer.write(record)
                pending, clock = [], now
                if progress is not None:
                    progress(step, {k: v for k, v in record.items() if k != "experts"})
            if save:
                _save(manager, step, state, identity)
            if stop:
                manager.wait_until_finished()
                raise distributed.preempted(run_folder, step)
        manager.wait_until_finished()
    trained = distributed.gather(state.expert, sharding.replicated(mesh))
    return [
        TrainedExpert(m.id, to_storage(unstack(trained, i), config), writer.history(m.id))
        for i, m in enumerate(members)
    ]


def _stacked(expert: Tree, count: int, program: Program) -> Tree:
    """Lays `count` copies of one expert out as the state has them."""
    copies = jax.tree.map(
        lambda x: np.broadcast_to(np.asarray(x, np.float32), (count, *np.shape(x))), expert
    )
    return distributed.put(copies, program.state.expert)


def _batches(
    members: Sequence[Member], start: int, stop: int, mesh: Mesh, rules: LogicalRules
) -> Iterator[tuple[int, dict[str, jax.Array]]]:
    """Yields (steps done after it, stacked batch), made ahead of time in one thread."""
    place = sharding.batch_sharding(mesh, rules)

    def make(step: int) -> dict[str, jax.Array]:
        batches = [m.stream.batch_at(step) for m in members]
        for member, batch in zip(members[1:], batches[1:], strict=True):
            for name, array in batch.items():
                if array.shape != batches[0][name].shape:
                    raise ElmError(
                        f"experts of one stack need batches of one shape: {name} is "
                        f"{array.shape} for {member.id!r}, {batches[0][name].shape} for "
                        f"{members[0].id!r}"
                    )
        rows = len(batches[0]["encoder_input_tokens"])
        sharding.check_work(mesh, len(members), rows, rules)
        stacked = {name: np.stack([b[name] for b in batches]) for name in batches[0]}
        return distributed.put(stacked, place)

    ahead = 2
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        queue = [pool.submit(make, step) for step in range(start, min(start + ahead, stop))]
        for step in range(start, stop):
            batch = queue.pop(0).result()
            if step + ahead < stop:
                queue.append(pool.submit(make, step + ahead))
            yield step + 1, batch


def _record(
    members: Sequence[Member],
    step: int,
    metrics: Sequence[Mapping[str, np.ndarray]],
    seconds: float,
    checkpoints: str,
) -> dict[str, Any]:
    """Averages the metrics since the last record; refuses numbers that are not finite.

    `checkpoints` says where those of the run are, and of which step the last one is.
    """
    stacked = {name: np.stack([m[name] for m in metrics]) for name in metrics[0]}  # [steps, X]
    loss, gradient, norm = (stacked[name] for name in ("loss", "grad_norm", "expert_norm"))
    finite = np.isfinite(loss) & np.isfinite(gradient) & np.isfinite(norm)
    if not finite.all():
        at = when, who = tuple(np.argwhere(~finite)[0])
        raise TrainingDiverged(
            f"expert {members[who].id!r}: the loss is {loss[at]}, the norm of the gradient "
            f"{gradient[at]} and of the expert {norm[at]} at step "
            f"{step - len(metrics) + 1 + when}; training stopped; checkpoints are in "
            f"{checkpoints}; a lower learning rate may help"
        )
    names = ("loss", "accuracy", "grad_norm", "expert_norm")
    return {
        "step": step,
        "tokens_per_second": round(float(stacked["tokens"].sum()) / max(seconds, 1e-9), 1),
        "loss": float(stacked["loss"].mean()),
        "accuracy": float(stacked["accuracy"].mean()),
        "experts": {
            member.id: {name: float(stacked[name][:, i].mean()) for name in names}
            for i, member in enumerate(members)
        },
    }


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "expert": state.expert, "opt_state": state.opt_state}


def _save(
    manager: ocp.CheckpointManager, step: int, state: TrainState, identity: Mapping[str, Any]
) -> None:
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(_as_dict(state)), identity=ocp.args.JsonSave(dict(identity))
        ),
    )


def _restore(
    manager: ocp.CheckpointManager,
    shapes: TrainState,
    state_shardings: TrainState,
    identity: Mapping[str, Any],
    folder: epath.Path,
) -> TrainState | None:
    """Reads the newest checkpoint, if there is one, after checking that it is of this run."""
    step = manager.latest_step()
    if step is None:
        return None
    found = manager.restore(step, args=ocp.args.Composite(identity=ocp.args.JsonRestore()))
    wanted = json.loads(json.dumps(identity))
    stored = found["identity"]
    different = [k for k in {**stored, **wanted} if stored.get(k) != wanted.get(k)]
    if different:
        raise ElmError(
            f"{folder} holds a run that differs in {', '.join(different)}; "
            "delete it or name another folder"
        )
    target = jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
        _as_dict(shapes),
        _as_dict(state_shardings),
    )
    restored = manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
    )["state"]
    return TrainState(**restored)
