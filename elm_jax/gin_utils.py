"""Running a function from gin files and `--gin.NAME=VALUE` flags, as t5x's scripts do."""

from __future__ import annotations

import argparse
import importlib.util  # noqa: F401  (gin-config 0.5.0 uses it without importing it)
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from elm_jax import gin_check
from elm_jax.cli import common
from elm_jax.cli.main import describe, interrupted
from elm_jax.errors import ElmError, Preempted, nearest


def gin_folder() -> Path:
    """Returns the folder of the gin files: inside an installed package, else beside it."""
    package = Path(__file__).resolve().parent
    inside = package / "gin"
    return inside if inside.is_dir() else package.parent / "gin"


def parse_arguments(
    argv: Sequence[str], description: str, *, distributed: bool = False
) -> argparse.Namespace:
    """Parses `--gin_file` (repeated), `--gin_search_paths` and `--gin.NAME=VALUE`.

    Returns:
      A namespace with `gin_file` (list), `gin_search_paths` (list), `bindings` (list of gin text),
      and with `distributed` what `common.join` reads. A value that is no gin expression is taken
      as a string, so that quotes are optional.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gin_file",
        action="append",
        required=True,
        metavar="FILE",
        help="a path, or one below a search path, such as runs/train_experts.gin",
    )
    parser.add_argument(
        "--gin_search_paths",
        default="",
        metavar="DIR,DIR",
        help="more folders to look for files and includes; the package's own come last",
    )
    parser.add_argument(
        "--gin.NAME",
        action="append",
        metavar="VALUE",
        default=[],
        dest="unused",
        help="sets a macro or parameter, such as --gin.TRAIN_STEPS=100",
    )
    if distributed:
        common.add_distributed(parser)
    flags = [arg for arg in argv if arg.startswith("--gin.")]
    for flag in flags:
        if "=" not in flag:
            parser.error(f"expected {flag}=VALUE")
    args = parser.parse_args([arg for arg in argv if not arg.startswith("--gin.")])
    args.gin_search_paths = [path for path in args.gin_search_paths.split(",") if path]
    args.bindings = [_binding(flag.removeprefix("--gin.")) for flag in flags]
    return args


def _binding(flag: str) -> str:
    from gin import config

    name, _, value = flag.partition("=")
    try:
        config.parse_value(value)
    except (SyntaxError, ValueError):
        value = repr(value)
    return f"{name} = {value}"


def run(
    function: Callable[..., Any], argv: Sequence[str] | None = None, *, distributed: bool = False
) -> int:
    """Calls `function` with the parameters that the gin files bind.

    Args:
      function: of the script that is `__main__`.
      argv: arguments; those of the process by default.
      distributed: whether it may run as several processes, and stops on SIGTERM with a checkpoint.

    Returns:
      The exit status: 0 done, 1 failed, 75 asked to stop, 130 interrupted; bad arguments exit
      with 2.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    description = sys.modules[function.__module__].__doc__ or ""
    args = parse_arguments(arguments, description, distributed=distributed)
    folders = [*map(Path, args.gin_search_paths), Path(), gin_folder()]
    if distributed:
        try:
            common.join(args)  # before a gin file imports JAX
        except ElmError as error:
            return _fail(str(error))
    import gin

    try:
        gin_check.set_search_path(folders)
        gin.parse_config_files_and_bindings(args.gin_file, args.bindings, finalize_config=False)
        gin_check.check_use(function, args.gin_file, args.bindings, folders, [gin_folder()])
        gin.finalize()
    except Exception as error:  # whatever is wrong in a configuration is its writer's to mend
        return _fail(str(error) + _nearest_parameter(str(error), function))
    try:
        gin.get_configurable(function)()
    except KeyboardInterrupt:
        return interrupted(leave_now=argv is None)
    except Exception as error:
        line = describe(error)
        if line is None and isinstance(error, (TypeError, ValueError)) and "gin" in str(error):
            line = str(error)  # a parameter that is missing, or of the wrong type
        if line is None or os.environ.get("ELM_JAX_DEBUG"):
            raise
        return _fail(line, error.exit_status if isinstance(error, Preempted) else 1)
    return 0


def _nearest_parameter(message: str, function: Callable[..., Any]) -> str:
    """Completes gin's message about a parameter that a configurable lacks."""
    found = re.search(r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", message)
    if found is None:
        return ""
    used = gin_check.used([function]).items()
    names = [
        p
        for name, made in used
        if f".{name}".endswith(f".{found[1]}")
        for p in inspect.signature(made).parameters
    ]
    return nearest(found[2], names)


def _fail(text: str, status: int = 1) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return status
