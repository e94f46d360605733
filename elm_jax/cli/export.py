"""`elm-jax export`: writes experts as files for other tools."""

from __future__ import annotations

import argparse
from typing import Any

from elm_jax.cli import common


def add_parser(subparsers: Any) -> None:
    """Adds `export`."""
    parser = common.command(
        subparsers,
        "export",
        help="write an expert for another tool, or a table about several",
        example="elm-jax export store ag_news --format peft --output ag_news_lora",
        description="safetensors and npz hold the arrays under their paths, peft is for Hugging "
        "Face PEFT (LoRA), adapters for AdapterHub's library (bottleneck adapters). csv and "
        "parquet are tables about the arrays (norms, singular values) and, of several experts, "
        "the cosines between them.",
    )
    parser.add_argument("store", metavar="STORE")
    parser.add_argument(
        "id", metavar="ID", nargs="+", help="one; for tables several, or patterns such as '*'"
    )
    parser.add_argument(
        "--format",
        default="safetensors",
        help="safetensors, npz, peft, adapters, csv or parquet (%(default)s)",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exports the experts."""
    from elm_jax.experts import ExpertStore, export_expert

    store = ExpertStore(args.store)
    names = [name for pattern in args.id for name in _expand(pattern, store.ids())]
    print(export_expert(store, names, args.output, format=args.format))
    return 0


def _expand(pattern: str, ids: list[str]) -> list[str]:
    """Returns the ids that a pattern matches; anything else is an id."""
    import fnmatch

    from elm_jax.errors import ElmError

    if not set(pattern) & set("*?["):
        return [pattern]
    names = fnmatch.filter(ids, pattern)
    if not names:
        raise ElmError(f"pattern {pattern!r} matches none of {len(ids)} experts")
    return names
