"""A process that stays behind to say how a run of several processes ended.

Where one process of a run is lost, or never comes, JAX's runtime aborts the others in C++. Its
callback for this cannot be a Python function (jaxlib 0.10: std::bad_cast). So what ends is a child,
and its parent, which imports nothing of JAX, speaks.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

LOST = (
    "elm-jax: JAX ended this process (SIGABRT; its reasons are above): most likely another process "
    "of this run was lost. The same command goes on from the last checkpoint, also with another "
    "number of processes or another mesh"
)
NOT_MET = (
    "elm-jax: error: the processes of this run did not meet ({}): JAX waited in vain for the "
    "others (SIGABRT; its reasons are above)"
)


def stay_behind(tried: str) -> Callable[[], None]:
    """Goes on in a child; this process waits for it, says how it ended, and ends with its status.

    A signal is 128 and its number, as in a shell, but 1 where JAX aborts a child that has met
    nobody: another try would most likely end so, too. SIGTERM is passed on, and the child ends with
    its parent. Does nothing where JAX is loaded already, as its threads would be missing in the
    child.

    Args:
      tried: how the processes are to find each other.

    Returns:
      What the child is to call when they have.
    """
    if "jax" in sys.modules or not hasattr(os, "fork"):
        return lambda: None
    sys.stdout.flush()  # what is not written yet would be written twice
    parent = os.getpid()
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(told)
        _end_with(parent)
        return functools.partial(_tell, tell)
    os.close(tell)
    os.set_blocking(told, False)

    def pass_on(number: int, _: FrameType | None) -> None:
        os.kill(child, number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the child, too
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGABRT and _has_told(told):
        print(LOST, file=sys.stderr, flush=True)
    elif status == -signal.SIGABRT:
        print(NOT_MET.format(tried), file=sys.stderr, flush=True)
        status = 1
    os._exit(status if status >= 0 else 128 - status)


def _tell(pipe: int) -> None:
    os.write(pipe, b"met")
    os.close(pipe)


def _has_told(pipe: int) -> bool:
    try:
        return bool(os.read(pipe, 1))
    except BlockingIOError:  # a child of the child has the other end
        return False


def _end_with(parent: int) -> None:
    """Lets the kernel kill this process when its parent ends."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(128 + signal.SIGKILL)
