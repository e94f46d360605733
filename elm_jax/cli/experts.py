"""`elm-jax experts`: lists, shows and verifies the experts of a store."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from elm_jax.cli import common


def add_parser(subparsers: Any) -> None:
    """Adds `experts list`, `experts show` and `experts verify`."""
    parser = common.command(
        subparsers,
        "experts",
        help="list, show or verify the experts of a store",
        example="elm-jax experts verify store",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="{list,show,verify}")
    helps = {
        "list": "list the experts",
        "show": "show all that is known of an expert, its arrays included",
        "verify": "check files and checksums of one expert, or of all; exit status 1 if one fails",
    }
    for name, text in helps.items():
        example = f"elm-jax experts {name} store" + (" ag_news" if name == "show" else "")
        action = common.command(actions, name, help=text, example=example)
        action.add_argument("store", metavar="STORE")
        action.add_argument("id", metavar="ID", nargs=None if name == "show" else "?")
        action.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the action."""
    from elm_jax.errors import ElmError
    from elm_jax.experts import ExpertStore, flatten

    store = ExpertStore(args.store)
    if args.action == "show":
        info = store.info(args.id)
        arrays = {
            path: {"shape": list(meta.shape), "dtype": str(meta.dtype)}
            for path, meta in flatten(store.shapes(args.id)).items()
        }
        common.print_json({**info.to_json(), "arrays": arrays})
        return 0
    if args.id is not None:
        store.folder(args.id)  # an error names the nearest id
    ids = store.ids() if args.id is None else [args.id]
    if args.action == "list":
        infos = [store.info(name) for name in ids]
        if args.json:
            common.print_json([info.to_json() for info in infos])
        else:
            common.print_table(
                ("expert", "kind", "parameters", "tasks", "prompts", "backbone", "loss"),
                [
                    (
                        i.id,
                        i.kind,
                        i.parameters,
                        len(i.tasks),
                        len(i.prompts),
                        i.backbone["name"],
                        i.metrics.get("loss", "-"),
                    )
                    for i in infos
                ],
            )
        return 0
    if not ids and not store.leftovers():
        raise ElmError(f"{store.path} holds no expert to verify")
    problems = {name: found for name in ids if (found := store.verify(name))}
    leftovers = [str(path) for path in store.leftovers()] if args.id is None else []
    if args.json:
        common.print_json({"checked": ids, "problems": problems, "leftovers": leftovers})
    else:
        for name in ids:
            print(f"{name}: {'; '.join(problems[name]) if name in problems else 'ok'}")
        for path in leftovers:
            print(f"{path}: left by a killed writer; it is not listed, delete it", file=sys.stderr)
    return 1 if problems else 0
