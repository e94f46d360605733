"""Running a function from gin files and `--gin.NAME=VALUE` flags, as t5x's scripts do."""

from __future__ import annotations

import argparse
import importlib.util  # noqa: F401  (gin-config 0.5.0 uses it without importing it)
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from elm_jax.cli.main import describe
from elm_jax.errors import ElmError, nearest


def gin_folder() -> Path:
    """Returns the folder of the gin files: inside an installed package, else beside it."""
    package = Path(__file__).resolve().parent
    inside = package / "gin"
    return inside if inside.is_dir() else package.parent / "gin"


def parse_arguments(argv: Sequence[str], description: str) -> argparse.Namespace:
    """Parses `--gin_file` (repeated), `--gin_search_paths` and `--gin.NAME=VALUE`.

    Returns:
      A namespace with `gin_file` (list), `gin_search_paths` (list) and `bindings` (list of gin
      text). A value that is no gin expression is taken as a string, so that quotes are optional.
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


def run(function: Callable[..., Any], argv: Sequence[str] | None = None) -> int:
    """Calls `function` with the parameters that the gin files bind.

    Args:
      function: of the script that is `__main__`.
      argv: arguments; those of the process by default.

    Returns:
      The exit status: 0 done, 1 failed; bad arguments exit with 2.
    """
    import gin

    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parse_arguments(arguments, sys.modules[function.__module__].__doc__ or "")
    for path in [str(gin_folder()), *reversed(args.gin_search_paths), "."]:
        gin.add_config_file_search_path(path)
    # gin logs an error for every search path that lacks a file, found elsewhere or not.
    logging.getLogger().addFilter(lambda record: "Path not found" not in record.getMessage())
    try:
        gin.parse_config_files_and_bindings(args.gin_file, None, finalize_config=False)
        for binding in args.bindings:
            _check_macro(binding.partition(" = ")[0], args.gin_file)
        gin.parse_config_files_and_bindings([], args.bindings)
    except Exception as error:  # whatever is wrong in a configuration is its writer's to mend
        return _fail(str(error))
    try:
        gin.get_configurable(function)()
    except Exception as error:
        line = describe(error)
        if line is None and isinstance(error, (TypeError, ValueError)) and "gin" in str(error):
            line = str(error)  # a parameter that is missing, or of the wrong type
        if line is None or os.environ.get("ELM_JAX_DEBUG"):
            raise
        return _fail(line)
    return 0


def _check_macro(name: str, files: Sequence[str]) -> None:
    """Refuses to set a macro that no file has; gin would take it and do nothing."""
    import gin

    if "." in name or "/" in name:
        return  # a parameter, which gin checks itself
    try:
        gin.query_parameter(f"%{name}")
    except ValueError:
        folders = [gin_folder(), Path(".")]
        texts = [f.read_text() for d in folders for name_ in files if (f := d / name_).is_file()]
        known = re.findall(r"^(\w+) = ", "\n".join(texts), re.MULTILINE)
        raise ElmError(f"no gin file has a macro {name!r}{nearest(name, known)}") from None


def _fail(text: str) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return 1
