"""What several commands share: argument types, progress bars, plain tables."""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def command(subparsers: Any, name: str, *, help: str, example: str, **kwargs: Any) -> Any:
    """Adds a command whose --help ends with an example."""
    return subparsers.add_parser(
        name,
        help=help,
        description=kwargs.pop("description", help[:1].upper() + help[1:] + "."),
        epilog=f"example:\n  {example}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **kwargs,
    )


def key_value(text: str) -> tuple[str, Any]:
    """Parses KEY=VALUE, the value a Python literal or else a string.

    >>> key_value('rank=4'), key_value('targets=("q", "v")'), key_value('placement=parallel')
    (('rank', 4), ('targets', ('q', 'v')), ('placement', 'parallel'))
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def key_integer(text: str) -> tuple[str, int]:
    """Parses KEY=INTEGER."""
    key, value = key_value(text)
    if not isinstance(value, int):
        raise argparse.ArgumentTypeError(f"expected KEY=INTEGER, got {text!r}")
    return key, value


def floats(text: str) -> list[float]:
    """Parses numbers with commas between them."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers like 0.5,0.5, got {text!r}") from None


def print_json(data: Any) -> None:
    """Prints JSON for a program."""
    json.dump(data, sys.stdout, indent=2, ensure_ascii=False)
    print()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints an aligned table; numbers to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    numeric = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        parts = (
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, numeric, strict=True)
        )
        return "  ".join(parts).rstrip()

    print(line(columns))
    print("  ".join("-" * width for width in widths))
    for row in cells:
        print(line(row))


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


class ProgressBar:
    """A tqdm bar on stderr that is told how much is done, as callbacks of the library do."""

    def __init__(self, unit: str, *, hide: bool = False) -> None:
        from tqdm import tqdm

        self._bar = tqdm(unit=f" {unit}", file=sys.stderr, disable=hide, dynamic_ncols=True)

    def update(
        self, done: int, total: int, label: str, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Moves the bar."""
        self._bar.total = total
        self._bar.set_description(label, refresh=False)
        if metrics:
            shown = {k: f"{v:,.4g}" for k, v in metrics.items() if k not in ("step",)}
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()
