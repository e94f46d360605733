"""`elm-jax export`: writes an expert as plain files."""

from __future__ import annotations

import argparse
from typing import Any

from elm_jax.cli import common


def add_parser(subparsers: Any) -> None:
    """Adds `export`."""
    parser = common.command(
        subparsers,
        "export",
        help="write an expert as safetensors or npz",
        example="elm-jax export store ag_news --format safetensors --output ag_news_expert",
    )
    parser.add_argument("store", metavar="STORE")
    parser.add_argument("id", metavar="ID")
    parser.add_argument("--format", default="safetensors", help="safetensors or npz (%(default)s)")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exports the expert."""
    from elm_jax.experts import ExpertStore, export_expert

    folder = export_expert(ExpertStore(args.store), args.id, args.output, format=args.format)
    print(folder)
    return 0
