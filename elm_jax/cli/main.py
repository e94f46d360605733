"""`elm-jax`: parses arguments, runs a command, turns errors into one line and an exit status."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from elm_jax.errors import ElmError, Preempted
from elm_jax.version import __version__

COMMANDS = (
    "render",
    "train",
    "fleet",
    "experts",
    "library",
    "merge",
    "evaluate",
    "report",
    "compare",
    "tables",
    "export",
    "backbone",
    "mini",
    "explain-sharding",
    "plan",
)
_DESCRIPTION = """\
Trains many small experts over one frozen T5, then retrieves, merges and evaluates them.

A usual order: train -> library build -> evaluate -> report.
Exit status: 0 done, 1 failed, 2 bad arguments, 130 interrupted, 75 asked to stop and 134
another process of the run was lost (run it again).
ELM_JAX_DEBUG=1 shows tracebacks.
"""


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands; imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="elm-jax",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"elm-jax {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"elm_jax.cli.{name.replace('-', '_')}")
        module.add_parser(subparsers)
    return parser


def describe(error: BaseException) -> str | None:
    """Returns the one line that a user needs of an error, or None if it is a bug of ours."""
    text = " ".join(str(error).split())
    if isinstance(error, (FileNotFoundError, FileExistsError)) and error.filename:
        return f"{error.filename}: {error.strerror}"  # by the system, which begins with a number
    if isinstance(error, (ElmError, FileNotFoundError, FileExistsError)):
        return text
    # Orbax and tensorstore wrap a full disk in types of their own.
    if "No space left on device" in text:
        return (
            f"the disk is full: {text[:300]}; nothing half-written is listed, "
            "free room and run it again"
        )
    if isinstance(error, OSError):
        return f"{type(error).__name__}: {text}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        extra = {"seqio": "data", "tensorflow": "data", "scann": "retrieval"}.get(
            error.name, "retrieval" if error.name == "sentence_transformers" else "all"
        )
        return f"the package {error.name!r} is not installed; pip install 'elm_jax[{extra}]'"
    return None


def _ignore_closed_loop(raised: sys.UnraisableHookArgs) -> None:
    """Says nothing of tensorstore's writes that end after Orbax, failing, has left its loop."""
    if isinstance(raised.exc_value, RuntimeError) and "loop is closed" in str(raised.exc_value):
        return
    sys.__unraisablehook__(raised)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: arguments without the program's name; those of the process by default.

    Returns:
      The exit status: 0 done, 1 failed, 2 bad arguments, 130 interrupted.
    """
    # TensorFlow, where a command loads it, should not fill the screen.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return interrupted(leave_now=argv is None)
    finally:
        if signal.getsignal(signal.SIGTERM) != on_sigterm:  # training stops on it
            signal.signal(signal.SIGTERM, on_sigterm)


def interrupted(*, leave_now: bool) -> int:
    """Says that a command was interrupted; returns its exit status, 130.

    Args:
      leave_now: end the process here. XLA may be compiling or computing in other threads, and the
        interpreter's own way out would now and then crash under them, with another status.
    """
    print("elm-jax: interrupted", file=sys.stderr)
    if leave_now:
        _leave(130)
    return 130


def _leave(status: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = make_parser().parse_args(argv)
    except SystemExit as error:
        return int(error.code or 0)
    debug = bool(os.environ.get("ELM_JAX_DEBUG"))
    if not debug:
        # What Orbax logs with a traceback it raises, too, and that is said in one line below.
        from absl import logging

        logging.set_verbosity(logging.FATAL)
        if sys.unraisablehook is sys.__unraisablehook__:
            sys.unraisablehook = _ignore_closed_loop
    try:
        return int(args.run(args) or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        line = describe(error)
        if line is None or debug:
            raise
        if isinstance(error, Preempted):
            print(f"elm-jax {args.command}: {line}", file=sys.stderr)
            return error.exit_status
        print(f"elm-jax {args.command}: error: {line}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
