"""`elm-jax mini`: writes the embedded suite as task folders."""

from __future__ import annotations

import argparse
from typing import Any

from elm_jax.cli import common


def add_parser(subparsers: Any) -> None:
    """Adds `mini`."""
    parser = common.command(
        subparsers,
        "mini",
        help="write the embedded suite of small tasks as folders",
        example="elm-jax mini --tasks train --output tasks",
    )
    parser.add_argument("--tasks", default="all", help="all, train, unseen or a task (%(default)s)")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the tasks."""
    from elm_jax.data import mini

    files = mini.write(args.output, tasks=args.tasks, seed=args.seed)
    print(f"{len(files)} files in {args.output}")
    return 0
