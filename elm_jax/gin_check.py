"""Checks gin files against the code: every name, every parameter, every macro.

A run file gives its command in its head (`python -m elm_jax.train --gin_file=...`) and is checked
as that script would read it: includes, imports, configurables, parameters, macros that nobody sets
or reads, bindings of what the run does not use, values that our own specs and configs refuse. The
other files are parts of those: their names are checked, and that some file reads what they set.

Files that need t5x are checked whole where t5x is importable. Elsewhere their syntax, includes and
what they name of this library are checked, and the rest is said to be skipped.

example:
  python -m elm_jax.gin_check                  # all files of the library
  python -m elm_jax.gin_check my_run.gin
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import logging
import os
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from elm_jax.errors import ElmError, nearest

COMMAND = re.compile(r"^#\s+python -m ([\w.]+)((?:.*\\\n#)*.*)$", re.MULTILINE)
Entry = str | Callable[..., Any]
OPTIONAL = ("t5x",)
"""Packages that may be missing: what files name of them is then skipped."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong in a gin file."""

    file: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/name` or `@scope/name()` in a value."""

    name: str


@dataclasses.dataclass(frozen=True)
class Macro:
    """`%NAME` in a value."""

    name: str


class Unavailable(Exception):
    """A name that cannot be looked up here, as an optional package is missing."""


@dataclasses.dataclass(frozen=True)
class GinFile:
    """A parsed file.

    Attributes:
      path: of the file.
      statements: gin's.
      script: the module that its head says to run, for a run file.
      beside: the gin files that the command in its head names.
    """

    path: Path
    statements: tuple[Any, ...]
    script: str | None
    beside: tuple[str, ...] = ()

    def of(self, kind: str) -> list[Any]:
        """Returns the statements of one of gin's classes."""
        return [s for s in self.statements if type(s).__name__ == f"{kind}Statement"]

    @property
    def macros(self) -> dict[str, int]:
        """The macros that it sets, and the line."""
        return {
            "/".join(filter(None, (s.scope, s.selector))): s.location.line_num
            for s in self.of("Binding")
            if not s.arg_name
        }


def read(path: Path) -> GinFile:
    """Parses a file without looking anything up.

    Raises:
      FileNotFoundError: if there is none.
      ElmError: for a syntax error, with its line.
    """
    from gin import config_parser

    class Delegate(config_parser.ParserDelegate):  # type: ignore[misc]
        def configurable_reference(self, name: str, evaluate: bool) -> Reference:
            return Reference(name)

        def macro(self, name: str) -> Macro:
            return Macro(name)

    if not path.is_file():
        raise FileNotFoundError(f"no gin file {path}")
    text = path.read_text(encoding="utf-8")
    try:
        statements = tuple(config_parser.ConfigParser(text, Delegate()))
    except SyntaxError as error:
        raise ElmError(f"{path}:{error.lineno or 0}: {error.msg}") from None
    except tokenize.TokenError as error:  # a bracket or string that is not closed
        text, (line, _) = error.args
        raise ElmError(f"{path}:{line}: {text}") from None
    command = COMMAND.search(text)
    if command is None:
        return GinFile(path, statements, None)
    beside = tuple(re.findall(r"--gin_file=(\S+)", command[2]))
    return GinFile(path, statements, command[1], beside)


def check(paths: Sequence[Path], folders: Sequence[Path]) -> tuple[list[Problem], list[str]]:
    """Checks files.

    Args:
      paths: gin files.
      folders: searched for what they include.

    Returns:
      The problems, and a line for each thing that was skipped.
    """
    problems: list[Problem] = []
    skipped: list[str] = []
    files: dict[Path, GinFile] = {}
    for path in paths:
        try:
            files[path] = read(path)
        except (ElmError, OSError) as error:
            line, _, text = str(error).removeprefix(f"{path}:").partition(": ")
            numbered = line.isdigit()
            problems.append(Problem(path, int(line) if numbered else 0, text if numbered else line))
    library = dict(files)  # who might read what a part sets
    for folder in folders[:1]:
        for path in sorted(folder.rglob("*.gin")):
            if path not in library:
                with contextlib.suppress(ElmError, OSError):
                    library[path] = read(path)
    parts = {part.path: part for f in library.values() for part in closure(f, folders)}
    for file in files.values():
        found, absent = _check_names(file, folders, library.values())
        if found:
            problems += found
        elif file.script is None:
            if not absent:
                problems += _check_part(file, parts.values())
        elif not absent:
            problems += _check_run(file, folders)
        skipped += [f"{file.path}: not checked whole, as {reason}" for reason in sorted(absent)]
    return problems, skipped


def closure(
    file: GinFile, folders: Sequence[Path], seen: frozenset[Path] = frozenset()
) -> Iterator[GinFile]:
    """Yields a file, those its command names beside it, and all that they include, if readable."""
    seen |= {file.path.resolve()}
    names = [statement.filename for statement in file.of("Include")]
    for path in (find(name, folders) for name in [*file.beside, *names]):
        if path is None or path.resolve() in seen:
            continue
        with contextlib.suppress(ElmError):  # reported when that file is checked
            yield from closure(dataclasses.replace(read(path), beside=()), folders, seen)
    yield file


def find(name: str, folders: Iterable[Path]) -> Path | None:
    """Returns the first `<folder>/<name>` that is a file."""
    return next((path for folder in folders if (path := folder / name).is_file()), None)


def search_folders(more: Iterable[str | Path] = ()) -> list[Path]:
    """Returns where includes are looked for: the library's folder, given ones, here, t5x's."""
    from elm_jax.gin_utils import gin_folder

    folders = [gin_folder(), *map(Path, more), Path()]
    spec = _spec("t5x")
    if spec is not None and spec.origin:
        folders.append(Path(spec.origin).parents[1])
    return folders


def references(value: Any, kind: type) -> Iterator[Any]:
    """Yields what is of a kind in a value, however deep in lists, tuples and dicts."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, dict):
        for item in value.items():
            yield from references(item, kind)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from references(item, kind)


# --- names: each statement by itself


def _check_names(
    file: GinFile, folders: Sequence[Path], library: Iterable[GinFile]
) -> tuple[list[Problem], set[str]]:
    """Checks includes, imports, configurables and parameters; returns what cannot be looked up."""
    problems: list[Problem] = []
    absent: set[str] = set()

    @contextlib.contextmanager
    def at(line: int) -> Iterator[None]:
        try:
            yield
        except Unavailable as error:
            absent.add(str(error))
        except (ElmError, ImportError) as error:
            problems.append(Problem(file.path, line, str(error)))

    for name in file.beside:
        with at(1):
            _check_file(name, folders)
    for statement in file.of("Include"):
        with at(statement.location.line_num):
            _check_file(statement.filename, folders)
    runs = file.script is not None or any(s.module == "__main__" for s in file.of("Import"))
    scripts = _scripts(file, library, folders) if runs else []
    for script in scripts:
        with at(1):
            _module(script)
    modules: dict[str, str] = {}
    for statement in file.of("Import"):
        modules[statement.bound_name()] = statement.module
        with at(statement.location.line_num):
            if statement.module == "__main__" and not scripts:
                raise ElmError("no script is known: neither this nor a file including it names one")
            if not statement.module.startswith(("__main__", "__gin__")):
                _module(statement.module)
    for statement in file.statements:
        selector = getattr(statement, "selector", None)
        parameter = getattr(statement, "arg_name", None)  # '' sets a macro, None opens a block
        with at(statement.location.line_num):
            if selector and parameter != "":
                _check_selector(selector, parameter, modules, scripts)
        for reference in references(getattr(statement, "value", None), Reference):
            with at(statement.location.line_num):
                _check_selector(reference.name.split("/")[-1], None, modules, scripts)
    return problems, absent


def _check_file(name: str, folders: Sequence[Path]) -> None:
    """Refuses a gin file that is not there.

    Raises:
      ElmError: naming the nearest.
      Unavailable: if it is one of a package that is missing.
    """
    if find(name, folders) is not None:
        return
    package, ours = name.split("/")[0], (folders[0] / name).parent.is_dir()
    if not ours:
        _check_installed(package)
    known = [str(path.relative_to(folders[0])) for path in folders[0].rglob("*.gin")]
    raise ElmError(f"no file {name!r} to include{nearest(name, known)}")


def _scripts(file: GinFile, library: Iterable[GinFile], folders: Sequence[Path]) -> list[str]:
    """Returns the modules that may be `__main__` when the file is read."""
    if file.script is not None:
        return [file.script]
    return sorted(
        {
            run.script
            for run in library
            if run.script is not None
            and any(part.path.resolve() == file.path.resolve() for part in closure(run, folders))
        }
    )


def _check_selector(
    selector: str, parameter: str | None, modules: dict[str, str], scripts: Sequence[str]
) -> None:
    """Looks a name, and perhaps a parameter of it, up in what its file imports.

    Raises:
      ElmError: if there is no such name or parameter.
      Unavailable: if it is of a package that is missing.
    """
    symbol, _, attribute = selector.partition(".")
    if symbol == "gin":
        return
    if symbol not in modules:
        raise ElmError(f"{selector}: no import gives {symbol!r}{nearest(symbol, modules)}")
    for module in scripts if modules[symbol] == "__main__" else [modules[symbol]]:
        accepted = _parameters(module, attribute)
        if parameter is not None and accepted is not None and parameter not in accepted:
            hint = nearest(parameter, accepted)
            raise ElmError(f"{selector} has no parameter {parameter!r}{hint}")


@functools.cache
def _spec(package: str) -> Any:
    """Finds a package; a mere folder of that name, without code, is none."""
    spec = importlib.util.find_spec(package)
    return spec if spec is not None and spec.origin is not None else None


def _check_installed(package: str) -> None:
    if package in OPTIONAL and _spec(package) is None:
        raise Unavailable(f"{package} is not installed")


def _module(name: str) -> Any:
    """Imports a module; one of ours that needs a missing package comes as its syntax tree.

    Raises:
      ImportError: if there is none.
      Unavailable: if it is of an optional package that is missing.
    """
    package = name.split(".")[0]
    _check_installed(package)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        absent = (error.name or "").split(".")[0]
        if package in OPTIONAL or absent not in OPTIONAL or _spec(absent) is not None:
            raise
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise
        return ast.parse(Path(spec.origin).read_text(encoding="utf-8"), spec.origin)


@functools.cache
def _parameters(module_name: str, attribute: str) -> frozenset[str] | None:
    """Returns the parameters of a function or class; None if it takes any.

    Raises:
      ElmError: if the module has no such function or class.
    """
    module = _module(module_name)
    if isinstance(module, ast.Module):
        return _parsed_parameters(module, module_name, attribute)
    found: Any = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise ElmError(f"{module_name} has no {attribute!r}{nearest(name, dir(found))}")
        found = getattr(found, name)
    if not callable(found):
        raise ElmError(f"{module_name}.{attribute} is no function or class")
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):  # some built-in functions have none
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind is not p.VAR_POSITIONAL)


def _parsed_parameters(
    module: ast.Module, module_name: str, attribute: str
) -> frozenset[str] | None:
    """Does the same with a module that cannot be imported here."""
    named = {n.name: n for n in module.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    node = named.get(attribute)
    if node is None:
        raise ElmError(f"{module_name} has no {attribute!r}{nearest(attribute, named)}")
    if isinstance(node, ast.ClassDef):
        made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if not made:  # a dataclass
            fields = [n.target for n in node.body if isinstance(n, ast.AnnAssign)]
            return frozenset(f.id for f in fields if isinstance(f, ast.Name)) or None
        node = made[0]
    if node.args.kwarg is not None:
        return None
    return frozenset(a.arg for a in [*node.args.args, *node.args.kwonlyargs]) - {"self"}


# --- parts: what a file without a script sets must be read by some file of the library


def _check_part(file: GinFile, library: Iterable[GinFile]) -> list[Problem]:
    """Checks the macros of a part."""
    everyone = [file, *library]
    read_macros = {m.name for f in everyone for s in f.of("Binding") for m in _macros(s)}
    set_macros = {name for f in everyone for name in f.macros}
    problems = [
        (line, f"nothing reads the macro {name!r}{nearest(name, read_macros)}")
        for name, line in file.macros.items()
        if name not in read_macros
    ]
    problems += [
        (
            statement.location.line_num,
            f"no file sets the macro {macro.name!r}{nearest(macro.name, set_macros)}",
        )
        for statement in file.of("Binding")
        for macro in _macros(statement)
        if macro.name not in set_macros and macro.name != "gin.REQUIRED"
    ]
    return [Problem(file.path, line, text) for line, text in problems]


def _macros(statement: Any) -> Iterator[Macro]:
    yield from references(statement.value, Macro)


# --- runs: as their script reads them


def _check_run(file: GinFile, folders: Sequence[Path]) -> list[Problem]:
    import gin

    assert file.script is not None
    beside = [path for name in file.beside if (path := find(name, folders)) is not None]
    paths = beside if any(p.resolve() == file.path.resolve() for p in beside) else [file.path]
    with fresh_gin(importlib.import_module(file.script), folders):
        try:
            gin.parse_config_files_and_bindings(list(map(str, paths)), None, finalize_config=False)
        except Exception as error:  # gin raises whatever the code that it meets raises
            return [Problem(file.path, 0, " ".join(str(error).split()))]
        parts = list(closure(file, folders))
        entries = script_functions(parts)
        texts = unset_macros(entries) + missing(entries)
        if not texts:
            texts = _refused(entries)
        problems = [Problem(file.path, 0, text) for text in texts]
        for part in parts:
            if part.path.is_relative_to(folders[0]) or part is file:
                unread = unread_macros(entries, part.macros)
                problems += [Problem(part.path, part.macros[n], t) for n, t in unread.items()]
                problems += _unreached(part, entries)
        return problems


@contextlib.contextmanager
def fresh_gin(script: Any, folders: Sequence[Path]) -> Iterator[None]:
    """An empty gin configuration in which `__main__` is a script's module."""
    import gin

    main = sys.modules["__main__"]
    gin.clear_config()
    gin.enter_interactive_mode()  # two scripts may both have a function `train`
    sys.modules["__main__"] = script
    set_search_path(folders)
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        gin.exit_interactive_mode()
        gin.clear_config()


def set_search_path(folders: Iterable[str | Path]) -> None:
    """Makes gin look for files in these folders alone, and without a word about the others.

    gin's own list begins with '', for which `include 'experts/adapter.gin'` is also looked up as a
    package `experts`: any folder of that name where Python looks for modules is then an error.
    """
    import gin

    gin.config._LOCATION_PREFIXES[:] = [str(Path(folder).resolve()) for folder in folders]
    _quiet_gin()


@functools.cache
def _quiet_gin() -> None:
    """Silences the error that gin logs for each search path that lacks a file found elsewhere."""
    logging.getLogger().addFilter(lambda record: "Path not found" not in record.getMessage())


def script_functions(files: Iterable[GinFile]) -> list[str]:
    """Returns gin's names of the script's functions that files bind."""
    names: dict[str, None] = {}
    for file in files:
        aliases = {s.bound_name() for s in file.of("Import") if s.module == "__main__"}
        for statement in file.of("Binding"):
            if statement.arg_name and statement.selector.split(".")[0] in aliases:
                names[statement.selector] = None
    return list(names)


def reached(entries: Iterable[Entry]) -> tuple[set[str], list[Any]]:
    """Follows the references of gin's current configuration from functions that a script calls.

    Args:
      entries: the functions, or gin's names of them.

    Returns:
      The macros that are read on the way, and the references.
    """
    import gin

    seen: set[str] = set()
    macros: set[str] = set()
    followed: list[Any] = []

    def visit(value: Any) -> None:
        for reference in references(value, gin.config.ConfigurableReference):
            scope, name = "/".join(reference.scopes), reference.configurable.selector
            if name == "gin.constant":
                continue
            if name == "gin.macro":
                if scope not in macros:
                    macros.add(scope)
                    with contextlib.suppress(ValueError):  # set nowhere
                        visit(gin.query_parameter(f"%{scope}"))
                continue
            followed.append(reference)
            if reference.scoped_selector not in seen:
                seen.add(reference.scoped_selector)
                visit(_bindings(reference))

    for entry in entries:
        visit(gin.get_bindings(entry, resolve_references=False))
    return macros, followed


def _bindings(reference: Any) -> dict[str, Any]:
    """Returns what is bound to the configurable of a reference, in its scope."""
    import gin

    name = "/".join([*reference.scopes, reference.configurable.selector])
    return gin.get_bindings(name, resolve_references=False)


def unset_macros(entries: Iterable[Entry]) -> list[str]:
    """Says which macros of gin's current configuration are read and set nowhere."""
    import gin

    macros, _ = reached(entries)
    known = []
    unset = []
    for name in macros:
        try:
            gin.query_parameter(f"%{name}")
            known.append(name)
        except ValueError:
            unset.append(name)
    return [f"no file sets the macro {name!r}{nearest(name, known)}" for name in unset]


def unread_macros(entries: Iterable[Entry], names: Iterable[str]) -> dict[str, str]:
    """Says which of some macros nothing reads, in gin's current configuration."""
    macros, _ = reached(entries)
    return {
        name: f"nothing reads the macro {name!r}{nearest(name, set(macros) - {name})}"
        for name in names
        if name not in macros
    }


def check_use(
    function: Callable[..., Any],
    gin_files: Iterable[str],
    bindings: Iterable[str],
    folders: Sequence[Path],
    library: Sequence[Path],
) -> None:
    """Refuses what gin would take and do nothing with, or would miss in the middle of a run.

    Args:
      function: what the script calls, with gin's current configuration.
      gin_files: those that the user names.
      bindings: the user's own, such as 'TRAIN_STEPS = 100'.
      folders: where files are looked for.
      library: folders of files whose macros a run need not read.

    Raises:
      ElmError: for a macro that is read but not set; and for a macro, or a parameter of this
        library, which the user set, by a flag or in a file of their own, and which nothing reads.
    """
    for text in unset_macros([function]):
        raise ElmError(text)
    names = [binding.partition("=")[0].strip() for binding in bindings]
    macros = [name for name in names if "." not in name]
    for path in (find(name, folders) for name in gin_files):
        if path is not None and not any(_is_in(path, folder) for folder in library):
            macros += read(path).macros
    for text in unread_macros([function], macros).values():
        raise ElmError(text)
    in_use = used([function])
    for name in names:
        selector = name.split("/")[-1].rpartition(".")[0]  # as much of the name as gin needs
        if not selector or selector.split(".")[-1] == function.__name__:
            continue
        if any(f".{full}".endswith(f".{selector}") for full in in_use):
            continue
        if _module_of(selector).startswith("elm_jax."):  # others may call their own by themselves
            raise ElmError(f"nothing reads {name}: the run does not use {selector}")


def _is_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _module_of(selector: str) -> str:
    """Returns the module of what gin knows by a name."""
    from gin import config

    return str(config.parse_value(f"@{selector}").configurable.wrapped.__module__)


def used(entries: Iterable[Entry]) -> dict[str, Any]:
    """Returns the functions and classes that a run uses, by gin's full names of them."""
    return {r.configurable.selector: r.configurable.wrapped for r in reached(entries)[1]}


def missing(entries: Iterable[Entry]) -> list[str]:
    """Says which parameters without a default are not bound where gin makes the call."""
    texts: dict[str, None] = {}
    for reference in reached(entries)[1]:
        if not reference.evaluate:
            continue
        bound = _bindings(reference)
        try:
            parameters = inspect.signature(reference.configurable.wrapped).parameters.values()
        except (TypeError, ValueError):
            continue
        for p in parameters:
            if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) or p.default is not p.empty:
                continue
            if p.name not in bound and p.name != "self":
                texts[f"{reference.selector} needs {p.name!r}, which no file binds"] = None
    return list(texts)


def _unreached(file: GinFile, entries: Sequence[Entry]) -> list[Problem]:
    """Finds parameters that a run file binds itself, of things that the run does not use."""
    in_use = list(used(entries).values())
    modules = {s.bound_name(): s.module for s in file.of("Import")}
    problems = []
    for statement in file.of("Binding"):
        symbol, *names = statement.selector.split(".")
        if not statement.arg_name or modules.get(symbol) == "__main__":
            continue
        found: Any = importlib.import_module(modules[symbol])
        for name in names:
            found = getattr(found, name)
        if found not in in_use:
            what = f"{statement.selector}.{statement.arg_name}"
            text = f"nothing reads {what}: the run does not use {statement.selector}"
            problems.append(Problem(file.path, statement.location.line_num, text))
    return problems


def _refused(entries: Iterable[Entry]) -> list[str]:
    """Builds our own specs and configs of a run, which check their values."""
    texts: dict[str, None] = {}
    for reference in reached(entries)[1]:
        made = reference.configurable.wrapped
        if not (dataclasses.is_dataclass(made) and made.__module__.startswith("elm_jax.")):
            continue
        if not reference.evaluate or _waits(reference):
            continue
        try:
            reference.scoped_configurable_fn()
        except (TypeError, ValueError) as error:
            texts[f"{reference.selector}: {str(error).splitlines()[0]}"] = None
    return list(texts)


def _waits(reference: Any) -> bool:
    """Whether a value below a reference is for the user to set."""
    import gin

    if reference.configurable.selector == "gin.constant":
        return True
    bound = _bindings(reference)
    return any(_waits(r) for r in references(bound, gin.config.ConfigurableReference))


def main(argv: Sequence[str] | None = None) -> int:
    """Checks files and says what is wrong; returns 0 if nothing is."""
    from elm_jax.gin_utils import gin_folder

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="files or folders; all by default")
    args = parser.parse_args(argv)
    paths: list[Path] = []
    for path in map(Path, args.paths or [gin_folder()]):
        inside = sorted(path.rglob("*.gin")) if path.is_dir() else [path]
        if not inside:
            print(f"error: no gin file in {path}", file=sys.stderr)
            return 1
        paths += inside
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    parents = [p if p.is_dir() else p.parent for p in map(Path, args.paths)]
    problems, skipped = check(paths, search_folders(parents))
    for line in skipped:
        print(f"skipped: {line}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{len(paths)} files, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
