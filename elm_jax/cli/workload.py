"""What `explain-sharding` and `plan` share: the arguments that say what is trained, and where."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from elm_jax.cli import common

if TYPE_CHECKING:
    from elm_jax.training.planning import Workload
    from elm_jax.training.sharding import AnyMesh, LogicalRules

DTYPES = {"bf16": "bfloat16", "f32": "float32", "fp32": "float32"}
PLAIN_SIZES = {"3b": "xl", "11b": "xxl"}


def add_arguments(parser: argparse.ArgumentParser, *, stack: int) -> None:
    """Adds the arguments.

    Args:
      parser: of the command.
      stack: X by default.
    """
    parser.add_argument(
        "--backbone",
        "--size",
        default="elm-tiny",
        metavar="NAME",
        help="a published size, such as t5_1_1_xl, mt5_base, t0_3b or xl (of T5 1.1), an embedded "
        "backbone or a folder (%(default)s); no weights are read",
    )
    common.add_expert(parser)
    step = parser.add_argument_group("step")
    step.add_argument(
        "--stack",
        "--experts-per-step",
        type=int,
        default=stack,
        metavar="X",
        help="experts trained at once (%(default)s)",
    )
    step.add_argument("--batch-size", type=int, default=32, help="per expert (%(default)s)")
    step.add_argument("--inputs-length", type=int, default=512, metavar="T")
    step.add_argument("--targets-length", type=int, default=128, metavar="U")
    step.add_argument("--accumulation", type=int, default=1, help="microbatches per step")
    step.add_argument("--optimizer", default="adamw", help="adamw or adafactor (%(default)s)")
    step.add_argument(
        "--dtype",
        type=_dtype,
        help="of the computation: bf16 or f32 (default: a folder's own, bf16 for a size)",
    )
    step.add_argument(
        "--weights-dtype", type=_dtype, help="of the frozen backbone (default: as --dtype)"
    )
    step.add_argument("--quantization", choices=("int8",), help="frozen matrices in int8")
    step.add_argument("--remat", default=None, help="none, minimal or full")
    step.add_argument("--attention", help="auto, plain, fused or memory_efficient")
    step.add_argument("--scan-layers", action="store_true", help="lay layers out in stacks")
    where = parser.add_argument_group("mesh")
    where.add_argument(
        "--mesh",
        nargs="+",
        default=["single"],
        metavar="AXIS=N",
        help="axes expert, data, fsdp, tensor, such as data=2,fsdp=4, or a preset: single, "
        "data_parallel, fsdp, tensor_parallel, expert_parallel (%(default)s)",
    )
    where.add_argument(
        "--devices", type=int, metavar="N", help="how many (default: those that --mesh names)"
    )
    where.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="LOGICAL=AXIS",
        help="change what is split over a mesh axis, such as adapter=tensor; may be repeated",
    )


def _dtype(text: str) -> str:
    return DTYPES.get(text, text)


def read_workload(args: argparse.Namespace) -> Workload:
    """Returns what the arguments say is trained.

    Raises:
      ElmError: for a backbone that is neither a size nor there.
    """
    from elm_jax.models import get_spec
    from elm_jax.training.optimizers import OptimizerSpec
    from elm_jax.training.planning import Workload

    given = {
        "dtype": args.dtype,
        "quantization": args.quantization,
        "remat": args.remat,
        "attention": args.attention,
        "scan_layers": args.scan_layers or None,
    }
    config = _config(args.backbone)
    config = config.replace(**{name: value for name, value in given.items() if value is not None})
    return Workload(
        config,
        get_spec(args.expert, **dict(args.expert_option)),
        experts_per_step=args.stack,
        batch_size=args.batch_size,
        inputs_length=args.inputs_length,
        targets_length=args.targets_length,
        accumulation=args.accumulation,
        optimizer=OptimizerSpec(name=args.optimizer),
        weights_dtype=args.weights_dtype or config.dtype,
    )


def _config(name: str) -> Any:
    """Returns the config of a folder or embedded backbone, or of a published size in bfloat16."""
    from elm_jax.checkpoints.backbone import EMBEDDED, open_backbone
    from elm_jax.errors import ElmError
    from elm_jax.models.sizes import get_config

    if name in EMBEDDED or os.path.exists(name) or name.count(os.sep) > 1:
        return open_backbone(name).config
    plain = PLAIN_SIZES.get(name.lower(), name.lower())
    try:
        if plain in ("small", "base", "large", "xl", "xxl"):
            return get_config(f"t5_1_1_{plain}", dtype="bfloat16")
        return get_config(name, dtype="bfloat16")
    except ElmError as error:
        raise ElmError(f"--backbone is neither a folder nor a published size: {error}") from error


def read_mesh(args: argparse.Namespace) -> tuple[AnyMesh, LogicalRules]:
    """Returns the mesh and the rules that the arguments say."""
    from elm_jax.training.sharding import MeshSpec, abstract_mesh, parse_rule

    spec = MeshSpec.parse(args.mesh, dict(map(parse_rule, args.rule)))
    return abstract_mesh(spec, args.devices), spec.logical_rules()


def show_bytes(count: float) -> str:
    """Returns a size in decimal units.

    >>> show_bytes(22.3e9), show_bytes(512)
    ('22.3 GB', '512 B')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
