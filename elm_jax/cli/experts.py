"""`elm-jax experts`: lists, shows and verifies the experts of a store, and imports into it."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from elm_jax.cli import common


def add_parser(subparsers: Any) -> None:
    """Adds `experts list`, `show`, `verify` and `import`."""
    parser = common.command(
        subparsers,
        "experts",
        help="list, show or verify the experts of a store, or import one",
        example="elm-jax experts verify store",
    )
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="{list,show,verify,import}"
    )
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
    _add_import(actions)
    parser.set_defaults(run=run)


def _add_import(actions: Any) -> None:
    action = common.command(
        actions,
        "import",
        help="add an expert of PEFT, adapters, T5X or an export of ours to a store",
        example="elm-jax experts import lora_folder --store store --id ag_news --backbone elm-tiny",
    )
    action.add_argument("path", metavar="PATH", help="the expert's folder")
    action.add_argument("--store", required=True, help="folder of experts, made if missing")
    action.add_argument("--id", required=True, help="what to call it there")
    action.add_argument("--backbone", required=True, help="name or folder of what it was made for")
    action.add_argument(
        "--format", metavar="FORMAT", help="peft, adapters, t5x or own; found out by default"
    )
    action.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK", help="names of what it was trained on"
    )
    action.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the action."""
    from elm_jax.errors import ElmError
    from elm_jax.experts import ExpertStore, flatten

    if args.action == "import":
        return _import(args)
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
        if not ids and not (store.path / ".runs").is_dir():
            raise ElmError(f"{store.path} holds no expert")
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


def _import(args: argparse.Namespace) -> int:
    import functools

    from elm_jax.checkpoints import load_backbone
    from elm_jax.experts import ExpertStore, import_expert
    from elm_jax.experts.imports import detect_format

    format = args.format or detect_format(args.path)
    backbone = load_backbone(args.backbone, on_host=True)
    loader = None
    if format == "t5x":
        from elm_jax.t5x.experts import load_t5x_expert

        loader = functools.partial(load_t5x_expert, backbone=backbone.params)
    info = import_expert(
        ExpertStore(args.store, create=True),
        args.path,
        args.id,
        config=backbone.config,
        backbone={"name": backbone.name, "fingerprint": backbone.fingerprint},
        format=format,
        tasks=args.tasks,
        loader=loader,
    )
    if args.json:
        common.print_json(info.to_json())
    else:
        common.print_table(
            ("expert", "kind", "parameters", "from", "backbone"),
            [(info.id, info.kind, info.parameters, format, backbone.name)],
        )
        empty = info.settings["imported"].get("projections_without_update")
        if empty:
            print(f"{empty} projections have no update and hold zeros", file=sys.stderr)
    return 0
