"""`elm-jax backbone`: shows a backbone, or writes it in another format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from elm_jax.cli import common

FORMATS = ("huggingface", "t5x", "t5x-legacy", "orbax", "own")


def add_parser(subparsers: Any) -> None:
    """Adds `backbone show` and `backbone export`."""
    parser = common.command(
        subparsers,
        "backbone",
        help="show a backbone or write it in another format",
        example="elm-jax backbone export flan-t5-small --format t5x --output runs/flan",
        description="Reads what --backbone takes elsewhere: an embedded name; a folder of elm_jax, "
        "of Hugging Face (safetensors) or of Orbax; a T5X checkpoint.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = common.command(
        actions,
        "show",
        help="config, parameters, dtype and fingerprint",
        example="elm-jax backbone show runs/t5/checkpoint_1000000 --json",
    )
    show.add_argument("path", metavar="PATH", help="name or folder")
    _add_config(show)
    show.add_argument("--json", action="store_true", help="print JSON")
    show.set_defaults(run=run_show)
    export = common.command(
        actions,
        "export",
        help="write a backbone, or one with an expert folded in, in another format",
        example="elm-jax backbone export elm-tiny --store store --expert rte --format huggingface "
        "--output rte_t5",
    )
    export.add_argument("path", metavar="PATH", help="name or folder")
    _add_config(export)
    export.add_argument("--format", choices=FORMATS, default="huggingface", help="(%(default)s)")
    export.add_argument(
        "--output", required=True, metavar="DIR", help="folder to make; T5X's run folder"
    )
    export.add_argument("--step", type=int, default=0, help="T5X: of the checkpoint (%(default)s)")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as stored")
    export.add_argument("--store", metavar="STORE", help="holds the expert to fold in")
    export.add_argument("--expert", metavar="ID", help="a 'full' or 'lora' expert of the store")
    export.set_defaults(run=run_export)


def _add_config(parser: Any) -> None:
    parser.add_argument(
        "--config",
        metavar="SIZE|GIN",
        help="for T5X and Orbax: a published size or a gin file, where shapes do not say enough",
    )


def run_show(args: argparse.Namespace) -> int:
    """Shows a backbone; its arrays are read one at a time, for the fingerprint."""
    import math

    from elm_jax.checkpoints import open_backbone
    from elm_jax.checkpoints.loading import stored_fingerprint

    source = open_backbone(args.path, config=args.config)
    found = stored_fingerprint(source.config, source.arrays)
    dtypes = sorted({array.dtype.name for array in source.arrays.values()})
    facts: dict[str, Any] = {
        "name": source.name,
        "format": source.format,
        "folder": str(source.folder),
        "parameters": sum(math.prod(array.shape) for array in source.arrays.values()),
        "bytes": sum(array.nbytes for array in source.arrays.values()),
        "dtypes": dtypes,
        "fingerprint": found,
        "vocabulary": str(source.vocabulary_path) if source.vocabulary_path else None,
        "vocabulary_ids": _ids(source.vocabulary_path),
        "config": source.config.to_json(),
    }
    if args.json:
        common.print_json(facts)
        return 0
    config = facts.pop("config")
    rows = [(key, ", ".join(x) if isinstance(x, list) else x) for key, x in facts.items()]
    for key, value in [*rows, *config.items()]:
        shown = f"{value:,}" if type(value) is int else "-" if value is None else value
        print(f"{key:32} {shown}")
    return 0


def _ids(path: Path | None) -> int | None:
    from elm_jax.data.vocabulary import load_vocabulary

    return load_vocabulary(path).vocab_size if path else None


def run_export(args: argparse.Namespace) -> int:
    """Exports a backbone."""
    from elm_jax.checkpoints import (
        fold_expert,
        load_backbone,
        save_backbone,
        save_huggingface,
        save_t5x,
    )
    from elm_jax.errors import ElmError
    from elm_jax.experts import ExpertStore

    if (args.store is None) != (args.expert is None):
        raise ElmError("--store and --expert go together: the store, and the expert's id in it")
    if args.expert is None:
        backbone = load_backbone(args.path, dtype=args.dtype, config=args.config, on_host=True)
    else:  # in the stored dtype, to which the expert belongs; cast after the sum
        backbone = load_backbone(args.path, config=args.config, on_host=True)
        owner = {"name": backbone.name, "fingerprint": backbone.fingerprint}
        info, arrays = ExpertStore(args.store).load(args.expert, backbone=owner)
        backbone = fold_expert(backbone, info.spec, arrays, args.expert)
        if args.dtype is not None:
            backbone = backbone.cast(args.dtype)
    if args.format == "huggingface":
        written = save_huggingface(backbone, args.output)
    elif args.format.startswith("t5x"):
        layout = "legacy" if args.format == "t5x-legacy" else "orbax"
        written = save_t5x(backbone, args.output, step=args.step, layout=layout)
    else:
        arrays_as = "orbax" if args.format == "orbax" else "safetensors"
        written = save_backbone(backbone, args.output, arrays=arrays_as)
    print(written)
    return 0
