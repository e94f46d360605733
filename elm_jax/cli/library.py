"""`elm-jax library`: builds expert libraries and searches them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elm_jax.retrieval import Library

_BUILD_EXAMPLE = """example:
  elm-jax library build store --output library --exclude 'multitask*'
"""
_SEARCH_EXAMPLE = """example:
  elm-jax library search library --instances tasks/rte/train.jsonl --top 5
"""


def add_parser(subparsers: Any) -> None:
    """Adds `library build` and `library search`."""
    parser = subparsers.add_parser(
        "library",
        help="build or search an expert library",
        description="An expert library holds embedded training instances of every expert of a "
        "store; instances of a new task vote for the expert whose training data is nearest.",
        epilog=_BUILD_EXAMPLE + _SEARCH_EXAMPLE.split("\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(dest="action", required=True, metavar="{build,search}")

    build = actions.add_parser(
        "build",
        help="gather the keys of a store's experts, embedding those that have none",
        epilog=_BUILD_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument("store", metavar="STORE", help="folder of experts")
    build.add_argument(
        "--output",
        required=True,
        metavar="LIB",
        help="folder to write; an older library is replaced",
    )
    build.add_argument(
        "--instances-per-expert", type=int, default=100, metavar="S", help="default: %(default)s"
    )
    build.add_argument(
        "--embedder",
        default="all-MiniLM-L6-v2",
        metavar="NAME",
        help="a name or a sentence-transformers folder (default: %(default)s)",
    )
    build.add_argument(
        "--include", nargs="+", default=[], metavar="P", help="only these expert ids"
    )
    build.add_argument("--exclude", nargs="+", default=[], metavar="P", help="not these expert ids")
    build.add_argument("--json", action="store_true", help="print JSON")

    search = actions.add_parser(
        "search",
        help="retrieve the expert for a task from some of its instances",
        epilog=_SEARCH_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    search.add_argument("library", metavar="LIB", help="a built library")
    search.add_argument(
        "--instances",
        required=True,
        metavar="FILE",
        help=".jsonl or .jsonl.gz with `inputs` (or `input`) and optional `answer_choices`",
    )
    search.add_argument(
        "--queries",
        type=int,
        default=32,
        metavar="Q",
        help="instances that vote (default: %(default)s)",
    )
    search.add_argument(
        "--seed", type=int, default=0, help="which instances are drawn (default: %(default)s)"
    )
    search.add_argument(
        "--top", type=int, default=5, metavar="N", help="experts to list (default: %(default)s)"
    )
    search.add_argument(
        "--embedder", metavar="NAME", help="a folder, where the library's embedder came from one"
    )
    search.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Runs one of the two; raises what is the user's to mend."""
    return _build(args) if args.action == "build" else _search(args)


def _build(args: argparse.Namespace) -> int:
    from elm_jax.retrieval import Library, load_embedder

    library = Library.build(
        args.store,
        load_embedder(args.embedder),
        instances_per_expert=args.instances_per_expert,
        include=args.include,
        exclude=args.exclude,
        progress=True,
    )
    library.save(args.output)
    summary = {"library": args.output, **_describe(library), "embedded": list(library.embedded)}
    if args.json:
        print(json.dumps(summary))
        return 0
    embedded = len(library.embedded)
    _print_table(
        [
            ("library", args.output),
            ("experts", f"{summary['experts']} ({embedded} embedded now)"),
            ("keys", f"{len(library.keys)} x {library.space.dimension}"),
            ("embedder", library.space.name),
            ("search", _search_line(library)),
        ]
    )
    return 0


def _search(args: argparse.Namespace) -> int:
    from elm_jax.errors import ElmError
    from elm_jax.retrieval import Library, load_embedder, read_texts

    if args.top < 1:
        raise ElmError(f"--top must be at least 1, got {args.top}")
    library = Library.load(args.library)
    texts = read_texts(args.instances)
    embedder = load_embedder(args.embedder or library.space.name)
    found = library.retrieve(texts, embedder, queries=args.queries, seed=args.seed)
    tasks = {entry.id: entry.tasks for entry in library.entries}
    top = list(found.votes)[: args.top]
    if args.json:
        ranked = [
            {
                "expert": expert,
                "votes": found.votes[expert],
                "similarity": found.similarity[expert],
                "tasks": tasks[expert],
            }
            for expert in top
        ]
        asked = {"queries": found.queries, "queries_requested": args.queries}
        print(json.dumps({"expert": found.expert, **asked, "top": ranked, **_describe(library)}))
        return 0
    rows = [("expert", "votes", "similarity", "tasks")]
    for expert in top:
        votes, similarity = f"{found.votes[expert]}/{found.queries}", found.similarity[expert]
        rows.append((expert, votes, f"{similarity:.3f}", ", ".join(tasks[expert])))
    _print_table(rows)
    return 0


def _describe(library: Library) -> dict[str, Any]:
    return {
        "experts": len(library.entries),
        "keys": len(library.keys),
        "dimension": library.space.dimension,
        "embedder": library.space.name,
        "index": library.index.kind,
        "recall": {str(k): value for k, value in library.index.recall},
    }


def _search_line(library: Library) -> str:
    index = library.index
    if index.kind == "exact":
        return "exact"
    return "ScaNN, " + ", ".join(f"recall@{k} {value:.3f}" for k, value in index.recall)


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
