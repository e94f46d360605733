"""`elm-jax explain-sharding`: where every array would lie, and whether it fits."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from elm_jax.cli import common, workload

if TYPE_CHECKING:
    from elm_jax.training.planning import Layout

DOES_NOT_FIT = 3


def add_parser(subparsers: Any) -> None:
    """Adds `explain-sharding`."""
    parser = common.command(
        subparsers,
        "explain-sharding",
        help="say where each array would lie on a mesh, and whether it fits, before a run",
        example="elm-jax explain-sharding --size xxl --expert adapter --stack 8 "
        "--mesh fsdp=4 --batch-size 4 --remat full --device-memory 80GB",
        description="Lays every array of backbone, expert and optimizer state out on a mesh of any "
        "size, and adds up what a device holds. Nothing is allocated, no device is needed. Bytes "
        "of arrays are exact; activations and working memory are estimates. With --device-memory "
        f"the exit status is 0 where it fits and {DOES_NOT_FIT} where it does not.",
    )
    workload.add_arguments(parser, stack=1)
    parser.add_argument(
        "--device-memory", metavar="SIZE", help="of one device, such as 80GB or 16GiB"
    )
    parser.add_argument(
        "--usable",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="of the device's memory: XLA and the driver take the rest (%(default)s)",
    )
    parser.add_argument("--all", action="store_true", help="list each layer by itself")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Prints the layout."""
    from elm_jax.errors import ElmError
    from elm_jax.training.planning import parse_bytes, plan_layout

    if not 0 < args.usable <= 1:
        raise ElmError(f"--usable must be in (0, 1], got {args.usable}")
    memory = None if args.device_memory is None else parse_bytes(args.device_memory)
    mesh, rules = workload.read_mesh(args)
    layout = plan_layout(workload.read_workload(args), mesh, rules)
    fits = None if memory is None else layout.total <= args.usable * memory
    if args.json:
        common.print_json(_as_json(layout) | {"device_memory": memory, "fits": fits})
    else:
        _print(layout, args.all)
        if memory is not None:
            print(
                f"\nfits: {'yes' if fits else 'no'}, {workload.show_bytes(layout.total)} of "
                f"{workload.show_bytes(args.usable * memory)} usable "
                f"({args.usable:.0%} of {args.device_memory})"
            )
    return DOES_NOT_FIT if fits is False else 0


def _as_json(layout: Layout) -> dict[str, Any]:
    return {
        "mesh": layout.mesh,
        "devices": layout.devices,
        "arrays": [
            {
                "group": row.group,
                "path": row.path,
                "shape": list(row.shape),
                "dtype": row.dtype,
                "spec": [list(e) if isinstance(e, tuple) else e for e in row.spec],
                "bytes": row.bytes,
                "device_bytes": row.device_bytes,
            }
            for row in layout.arrays
        ],
        "device_bytes": layout.device_bytes() | {"total": layout.total},
        "notes": list(layout.notes),
    }


def _print(layout: Layout, every: bool) -> None:
    rows: dict[tuple[Any, ...], list[Any]] = {}
    for row in layout.arrays:
        path = row.path if every else re.sub(r"layers_\d+", "layers_*", row.path)
        spec = ", ".join(_split(layout, entry) for entry in row.spec)
        key = (row.group, path, "x".join(map(str, row.shape)), row.dtype, spec)
        rows.setdefault(key, []).append(row.device_bytes)
    common.print_table(
        ("what", "array", "shape", "dtype", "split over", "count", "bytes/device"),
        [(*key, len(found), sum(found)) for key, found in rows.items()],
    )
    sizes = " x ".join(f"{axis}={size}" for axis, size in layout.mesh.items())
    print(f"\na device of {layout.devices} ({sizes}) holds")
    estimates = {"activations": "at most", "working": "about"}
    for name, count in layout.device_bytes().items():
        print(f"  {name:<16} {workload.show_bytes(count):>9}  {estimates.get(name, '')}".rstrip())
    print(f"  {'total':<16} {workload.show_bytes(layout.total):>9}")
    whole, held = layout.group_bytes("backbone")
    print(f"of the backbone's {workload.show_bytes(whole)}, {held / whole:.1%} on each device")
    for note in layout.notes:
        print(f"note: {note}")


def _split(layout: Layout, entry: Any) -> str:
    """Returns the mesh axes that do split an array's axis, or '-'."""
    axes = (entry,) if isinstance(entry, str) else entry or ()
    return "+".join(axis for axis in axes if layout.mesh[axis] > 1) or "-"
