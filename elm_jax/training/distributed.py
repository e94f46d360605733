"""Several processes on one run: who starts them, who writes, and how they end together.

JAX does the work (`jax.distributed`, one mesh over all processes). Here is only what a run needs
beside it: finding the others in bounded time, arrays that no process holds whole, one writer, one
run per folder, and a checkpoint when the scheduler asks for the machine.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from elm_jax.errors import ElmError, Preempted, nearest
from elm_jax.experts.tree import Tree

WAYS = ("none", "auto", "slurm", "kubernetes")
INITIALIZATION_SECONDS = 300
HEARTBEAT_SECONDS = 60
"""After so long without a sign of life a process counts as lost, and the others end."""
_JAX_WAYS = {"slurm": "slurm", "kubernetes": "k8s", "auto": None}
_MARKS = {"slurm": "SLURM_JOB_ID", "kubernetes": "KUBERNETES_SERVICE_HOST"}
_asked_to_stop = threading.Event()


def initialize(
    how: str = "none",
    process: tuple[int, int] | None = None,
    *,
    timeout: int = INITIALIZATION_SECONDS,
    heartbeat: int = HEARTBEAT_SECONDS,
) -> None:
    """Joins the other processes of a run; call it before anything else of JAX.

    Args:
      how: 'none' (one process), 'auto' (whatever JAX finds: TPU metadata, SLURM, Open MPI,
        Kubernetes), 'slurm', 'kubernetes', or HOST:PORT of process 0.
      process: (I, N) with HOST:PORT: this is process I of N.
      timeout: seconds to wait for the others.
      heartbeat: seconds after which a silent process counts as lost.

    Where a process is lost, JAX aborts the others (SIGABRT) once they miss it: at the next
    collective or after `heartbeat`, whichever tells first. It also aborts process 0, and under
    SLURM and the like any process, where the others do not come within `timeout`.

    A process that is alone on its host takes all of its devices; of several under SLURM or Open
    MPI each takes one, as JAX has it.

    Raises:
      ElmError: for an unknown way, one that this environment is not, or others that do not answer.
    """
    if how == "none":
        if process is not None:
            raise ElmError("--process I/N needs --distributed HOST:PORT")
        return
    if heartbeat < 1:
        raise ElmError(f"the heartbeat must be at least 1 second, got {heartbeat}")
    limits: dict[str, Any] = {
        "initialization_timeout": timeout,
        "heartbeat_timeout_seconds": heartbeat,
        "shutdown_timeout_seconds": heartbeat,  # one that failed waits no longer for the others
    }
    if ":" in how:
        host, _, port = how.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise ElmError(f"--distributed {how!r}: expected HOST:PORT, such as 10.0.0.1:1234")
        if process is None:
            raise ElmError(f"--distributed {how} needs --process I/N, I from 0")
        index, count = process
        if not 0 <= index < count:
            raise ElmError(f"process must be I/N with 0 <= I < N, got {index}/{count}")
        limits |= {"coordinator_address": how, "process_id": index, "num_processes": count}
        limits |= {"cluster_detection_method": "deactivate"}  # what the user says holds
        tried = f"process {index} of {count}, coordinator {how}"
        if index:  # JAX ends the process where nobody answers, without an error to catch
            _wait_for(host.strip("[]"), int(port), timeout, tried)
    elif how in WAYS:
        if process is not None:
            raise ElmError(f"--process I/N is for --distributed HOST:PORT, not {how!r}")
        if how in _MARKS and _MARKS[how] not in os.environ:
            raise ElmError(
                f"--distributed {how}: {_MARKS[how]} is not set, so this is no {how} job"
            )
        limits |= {"cluster_detection_method": _JAX_WAYS[how]}
        if _alone_on_host() and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
            limits |= {"local_device_ids": []}  # JAX's own choice is one device
        tried = f"found by {how!r}"
    else:
        raise ElmError(
            f"--distributed {how!r} is unknown{nearest(how, WAYS)}; "
            f"accepted: {', '.join(WAYS)} and HOST:PORT"
        )
    try:
        jax.distributed.initialize(**limits)
    except ValueError as error:
        raise ElmError(
            f"--distributed {how}: JAX does not find the processes of this run ({error}); name "
            "them by --distributed HOST:PORT --process I/N"
        ) from error
    except RuntimeError as error:
        raise _not_met(timeout, tried, str(error).strip().split("\n")[0]) from error


def _alone_on_host() -> bool:
    """Whether SLURM or Open MPI started no other process of this run on this host."""
    if (count := os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")) is not None:
        return count == "1"
    return os.environ.get("SLURM_GTIDS", "").isdigit()  # the tasks of this node, with commas


def _wait_for(host: str, port: int, timeout: int, tried: str) -> None:
    """Waits until the coordinator listens."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1, timeout)).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise _not_met(timeout, tried, str(error)) from error
        time.sleep(0.2)


def _not_met(timeout: int, tried: str, reason: str) -> ElmError:
    return ElmError(
        f"the processes of this run did not meet within {timeout} s ({tried}): {reason}"
    )


def is_writer() -> bool:
    """Whether this process writes what is written once: experts, metrics, summaries."""
    return jax.process_index() == 0


def once(write: Callable[[], object]) -> None:
    """Lets process 0 do what is done once, and waits for it.

    Where it fails, the others would wait for process 0 until they are aborted; so all fail.

    Raises:
      Exception: what `write` raises, in process 0; an ElmError with its text in the others.
    """
    failed: Exception | None = None
    if is_writer():
        try:
            write()
        except Exception as error:
            failed = error
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        size = 1024
        text = f"{failed or ''}" or (type(failed).__name__ if failed else "")
        said = np.frombuffer(text.encode()[:size].ljust(size, b"\0"), np.uint8)
        told = multihost_utils.broadcast_one_to_all(said).tobytes().rstrip(b"\0")
        if told and failed is None:
            raise ElmError(f"process 0 of this run failed: {told.decode(errors='ignore')}")
    if failed is not None:
        raise failed


def put(tree: Tree, shardings: Any) -> Tree:
    """Lays arrays out on a mesh, of which this process may hold a part.

    Args:
      tree: arrays that are equal in every process, or laid out so already.
      shardings: a tree of the same form, or one sharding for all.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        one = shardings
        shardings = jax.tree.map(lambda _: one, tree)

    def place(x: Any, sharding: Any) -> Any:
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)  # one that lies so already is not copied
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree, shardings)


def gather(tree: Tree, replicated: Any) -> Tree:
    """Returns arrays that this process can read whole; `replicated` is the sharding for that."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
        return tree
    return jax.jit(lambda x: x, out_shardings=replicated)(tree)


def stop_on_sigterm() -> None:
    """Makes SIGTERM end a run with a checkpoint; see `should_stop`.

    With several processes JAX listens for SIGTERM itself and lets all stop at the same step.
    """
    _asked_to_stop.clear()
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: _asked_to_stop.set())


def should_stop(step: int) -> bool:
    """Whether the run should write a checkpoint after this step and end; ask after each step."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return bool(multihost_utils.reached_preemption_sync_point(step))
    return _asked_to_stop.is_set()


def preempted(folder: epath.Path, step: int) -> Preempted:
    """Returns the error of a run that was asked to stop and wrote its checkpoint."""
    return Preempted(
        f"asked to stop: step {step} is in {folder / 'checkpoints'}; the same command goes on from "
        "there"
    )


@contextlib.contextmanager
def only_run(folder: epath.Path) -> Iterator[None]:
    """Refuses a second run on one folder while the first is going.

    The lock goes with its process, so a killed run leaves none. Buckets have no locks.

    Raises:
      ElmError: if another process holds the folder, in all processes of this run.
    """
    if "://" in os.fspath(folder):
        yield
        return
    with contextlib.ExitStack() as held:
        once(lambda: held.enter_context(_lock(folder)))
        yield


@contextlib.contextmanager
def _lock(folder: epath.Path) -> Iterator[None]:
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise ElmError(
                f"{folder} is in use by another run ({file.read().strip() or 'unknown'}); "
                "wait for it, or name another folder"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield


def describe() -> Mapping[str, int]:
    """Returns the processes and devices of this run."""
    return {
        "process": jax.process_index(),
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "local_devices": jax.local_device_count(),
    }
