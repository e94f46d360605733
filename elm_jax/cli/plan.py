"""`elm-jax plan`: FLOPs, memory, hours and cost of a fleet of experts."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from elm_jax.cli import common, workload


def add_parser(subparsers: Any) -> None:
    """Adds `plan`."""
    parser = common.command(
        subparsers,
        "plan",
        help="work out FLOPs, memory, hours and cost of a fleet of experts",
        example="elm-jax plan --size xl --experts 296 --stack 8 --mesh data=8,fsdp=4 --device v5e "
        "--examples-per-expert 50000 --utilisation 0.4 --price-per-device-hour 1.2",
        description="Counts the FLOPs of the step that training compiles (forward, and backward "
        "without gradients of frozen matrices) and what a device holds, and carries them on to a "
        "fleet. The utilisation is yours to say; communication, start and input are in it.",
    )
    workload.add_arguments(parser, stack=1)
    fleet = parser.add_argument_group("fleet")
    fleet.add_argument("--experts", type=int, default=1, help="in all (%(default)s)")
    fleet.add_argument("--examples-per-expert", type=int, default=50_000, metavar="N")
    fleet.add_argument("--epochs", type=int, default=5, help="passes over them (%(default)s)")
    fleet.add_argument("--steps", type=int, help="optimizer steps per expert, in place of epochs")
    fleet.add_argument(
        "--runs-at-once", type=int, default=1, metavar="N", help="meshes that work side by side"
    )
    hardware = parser.add_argument_group("hardware")
    hardware.add_argument(
        "--device",
        default="cpu",
        help="v4, v5e, v5p, v6e, a100-40gb, a100, h100, h200, or cpu, which is measured here "
        "(%(default)s)",
    )
    hardware.add_argument(
        "--utilisation",
        "--utilization",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="of the peak that the model's FLOPs reach, MFU (%(default)s)",
    )
    hardware.add_argument(
        "--peak-tflops", type=float, metavar="N", help="of a device, in place of the table's"
    )
    hardware.add_argument("--price-per-device-hour", type=float, metavar="PRICE")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Prints the plan."""
    from elm_jax.errors import ElmError
    from elm_jax.training.planning import Fleet, get_device, plan_fleet

    work = workload.read_workload(args)
    mesh, rules = workload.read_mesh(args)
    fleet = Fleet(
        experts=args.experts,
        examples_per_expert=args.examples_per_expert,
        epochs=args.epochs,
        train_steps=args.steps,
        at_once=args.runs_at_once,
    )
    device = get_device(args.device, work.config.dtype)
    notes = []
    if args.peak_tflops is not None:
        if not args.peak_tflops > 0:
            raise ElmError(f"--peak-tflops must be positive, got {args.peak_tflops}")
        device = dataclasses.replace(device, flops=args.peak_tflops * 1e12, source="as given")
    elif args.device != "cpu" and work.config.dtype != "bfloat16":
        notes.append(f"the peak of {args.device} is for bfloat16, {work.config.dtype} is slower")
    plan = plan_fleet(
        work,
        fleet,
        mesh,
        device,
        utilisation=args.utilisation,
        price=args.price_per_device_hour,
        rules=rules,
    )
    if plan.memory > device.memory:
        notes.append(
            f"a device needs {workload.show_bytes(plan.memory)} and has "
            f"{workload.show_bytes(device.memory)}; see elm-jax explain-sharding, --batch-size, "
            "--accumulation, --remat, --mesh"
        )
    if args.json:
        common.print_json(
            dataclasses.asdict(plan)
            | {
                "peak_flops": device.flops,
                "device_memory": device.memory,
                "source": device.source,
                "utilisation": args.utilisation,
                "notes": notes,
            }
        )
        return 0
    show = workload.show_bytes
    rows = [
        ("backbone", f"{plan.parameters:,} parameters"),
        ("expert", f"{plan.expert_parameters:,} parameters"),
        ("steps", f"{plan.steps:,} per expert, {plan.runs:,} stacks of {work.experts_per_step}"),
        ("tokens", f"{plan.tokens:.3g}, padding included"),
        ("FLOPs", f"{plan.flops:.3g}; {plan.step_flops:.3g} in one step of one expert"),
        ("memory", f"{show(plan.memory)} of {show(device.memory)} on each of {plan.devices}"),
        ("memory traffic", f"{show(plan.step_bytes)} on each device in one step of a stack"),
        ("device", f"{device.name}, {device.flops / 1e12:.4g} TFLOP/s ({device.source})"),
        ("step", f"{plan.seconds_per_step:.4g} s a stack, bound by {plan.bound}"),
        ("time", f"{plan.hours:,.4g} hours, {plan.device_hours:,.4g} device hours"),
        ("experts on disk", show(plan.store_bytes)),
    ]
    if plan.cost is not None:
        rows.append(("cost", f"{plan.cost:,.2f}"))
    for name, text in rows:
        print(f"{name:<16} {text}")
    for note in notes:
        print(f"note: {note}")
    return 0
