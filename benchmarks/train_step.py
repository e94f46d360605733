"""Measures the training of an expert against the usual PyTorch libraries, and prints JSON.

One optimizer step (forward, backward, update of the expert; AdamW, dropout 0.1, float32) on random
weights and tokens without padding. Contenders:
  ours_lora, ours_adapter: the step of elm_jax.training, one expert;
  ours_lora_per_element, ours_adapter_per_element: the same with a dropout mask for each element,
    as PyTorch draws them, in place of one shared along the length;
  peft_lora: Hugging Face PEFT, the same rank and the same projections (q and v, all attentions);
  adapters_parallel, adapters_sequential: AdapterHub's bottleneck adapters beside or after each
    feed-forward block, with the same bottleneck. Their package needs an older transformers than
    ours, so a Python of its own: python3.11 -m venv DIR; DIR/bin/pip install torch adapters;
    --adapters-python DIR/bin/python.
Each runs in a process of its own, which tells its highest resident memory; rounds are interleaved.

Example:
  python benchmarks/train_step.py --size tiny --adapters-python /path/to/venv/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "vocab": 1000, "dim": 64, "heads": 4, "head_dim": 16, "mlp": 128, "layers": 2,
        "batch": 32, "inputs": 64, "targets": 16,
    },
    "small": {
        "vocab": 32_128, "dim": 512, "heads": 6, "head_dim": 64, "mlp": 1024, "layers": 8,
        "batch": 8, "inputs": 128, "targets": 32,
    },
}  # fmt: skip
RANK, BOTTLENECK, LEARNING_RATE, DROPOUT = 8, 64, 1e-3, 0.1
OURS = ("ours_lora", "ours_adapter", "ours_lora_per_element", "ours_adapter_per_element")
ADAPTERS = ("adapters_parallel", "adapters_sequential")
ADAPTERS_NOTE = (
    "left out: no --adapters-python; make one with python3.11 -m venv DIR; "
    "DIR/bin/pip install torch adapters"
)
Step = Callable[[], float]
"""Takes one optimizer step and returns its loss when all is done."""


def threads() -> int:
    """Returns how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def draw(size: dict[str, int]) -> tuple[Any, Any]:
    """Draws inputs [B, T] and targets [B, U] without padding."""
    import numpy as np

    rng = np.random.default_rng(0)
    shapes = [(size["batch"], size[name]) for name in ("inputs", "targets")]
    inputs, targets = (rng.integers(2, size["vocab"], shape).astype(np.int32) for shape in shapes)
    return inputs, targets


def jax_program(name: str, size: dict[str, int]) -> tuple[Any, Any, tuple[Any, ...]]:
    """Builds the production step for a stack of one expert: (compiled, state, other arguments)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from elm_jax.checkpoints import initialize
    from elm_jax.experts import init_expert
    from elm_jax.models import T5, T5Config, get_spec
    from elm_jax.training import OptimizerSpec, TrainState, make_optimizer, make_train_step

    _, kind, *per_element = name.split("_")
    config = T5Config(
        size["vocab"], size["dim"], size["heads"], size["head_dim"], size["mlp"],
        size["layers"], size["layers"], dropout_rate=DROPOUT, dropout_broadcast=not per_element,
    )  # fmt: skip
    spec = get_spec(kind, **({"rank": RANK} if kind == "lora" else {"bottleneck": BOTTLENECK}))
    backbone = initialize(config, seed=0).params
    optimizer = make_optimizer(OptimizerSpec(learning_rate=LEARNING_RATE), train_steps=1)
    inputs, targets = draw(size)
    batch = {
        "encoder_input_tokens": jnp.asarray(inputs)[None],
        "decoder_input_tokens": jnp.asarray(np.pad(targets, ((0, 0), (1, 0)))[:, :-1])[None],
        "decoder_target_tokens": jnp.asarray(targets)[None],
        "decoder_loss_weights": jnp.ones_like(targets)[None],
    }
    keys = jax.random.split(jax.random.key(0), 1)
    expert = jax.vmap(lambda key: init_expert(config, spec, key))(keys)
    state = TrainState(jnp.zeros((), jnp.int32), expert, jax.vmap(optimizer.init)(expert))
    train_step = jax.jit(make_train_step(T5(config, spec), spec, optimizer), donate_argnums=0)
    rest = (backbone, keys, batch)
    return train_step.lower(state, *rest).compile(), state, rest


def jax_step(name: str, size: dict[str, int]) -> tuple[Step, dict[str, str]]:
    """Returns the production step as a loop calls it."""
    import jax

    train_step, state, rest = jax_program(name, size)

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, *rest)
        jax.block_until_ready(state)
        return float(metrics["loss"][0])

    return step, {name: version(name) for name in ("jax", "jaxlib", "flax")}


def torch_step(name: str, size: dict[str, int]) -> tuple[Step, dict[str, str]]:
    """Builds the training loop that users of PEFT and AdapterHub write."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.set_num_threads(threads())
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=size["vocab"],
        d_model=size["dim"],
        d_kv=size["head_dim"],
        d_ff=size["mlp"],
        num_layers=size["layers"],
        num_decoder_layers=size["layers"],
        num_heads=size["heads"],
        dropout_rate=DROPOUT,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        use_cache=False,
    )
    model: Any = T5ForConditionalGeneration(config)
    if name.startswith("peft"):
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q", "v"])
        model = get_peft_model(model, lora)
    else:
        import adapters

        one = adapters.ParBnConfig if "parallel" in name else adapters.SeqBnConfig
        adapters.init(model)
        model.add_adapter(
            "task",
            config=one(
                reduction_factor=size["dim"] / BOTTLENECK, non_linearity="relu", scaling=1.0
            ),
        )
        model.train_adapter("task")
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    if name.endswith("_compiled"):
        model = torch.compile(model)
    inputs, targets = (torch.from_numpy(array).long() for array in draw(size))
    mask = torch.ones_like(inputs)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=inputs, attention_mask=mask, labels=targets).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    package = "peft" if name.startswith("peft") else "adapters"
    return step, {name: version(name) for name in ("torch", "transformers", package)}


def work(name: str, size: dict[str, int], steps: int) -> dict[str, Any]:
    """Measures one contender in this process."""
    start = time.perf_counter()
    step, versions = (jax_step if name in OURS else torch_step)(name, size)
    step()
    first = time.perf_counter() - start
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - start)
    if not loss < float("inf"):
        sys.exit(f"{name}: the loss is {loss}")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "start_s": first,
        "step_s": seconds,
        "memory_mb": memory / 2**20,
        "versions": versions,
    }


def run(name: str, size: str, steps: int, python: str) -> dict[str, Any]:
    """Measures one contender in a process of its own."""
    root = Path(__file__).resolve().parents[1]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [python, __file__, "--worker", name, "--size", size, "--steps", str(steps)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{name} failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def summarize(results: dict[str, list[dict[str, Any]]], tokens: int) -> dict[str, Any]:
    """Medians over rounds of each round's median, and ratios to PEFT."""
    table: dict[str, Any] = {}
    for name, rounds in results.items():
        medians = [statistics.median(r["step_s"]) for r in rounds]
        best = min(second for r in rounds for second in r["step_s"])
        table[name] = {
            "tokens_per_s": round(tokens / statistics.median(medians), 1),
            "tokens_per_s_by_round": [round(tokens / m, 1) for m in medians],
            "tokens_per_s_best_step": round(tokens / best, 1),
            "peak_memory_mb": round(statistics.median(r["memory_mb"] for r in rounds), 1),
            "start_s": round(statistics.median(r["start_s"] for r in rounds), 2),
            "versions": rounds[0]["versions"],
        }
    base = table["peft_lora"]
    for row in table.values():
        row["speed_to_peft"] = round(row["tokens_per_s"] / base["tokens_per_s"], 3)
        row["memory_to_peft"] = round(row["peak_memory_mb"] / base["peak_memory_mb"], 3)
    return table


def main() -> None:
    """Prints the measurements, or (with --worker) those of one contender."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each contender")
    parser.add_argument("--steps", type=int, help="timed steps of a process (small 6, tiny 60)")
    parser.add_argument("--adapters-python", help="a Python with torch and adapters")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile, too")
    parser.add_argument("--only", nargs="+", default=[], help="these contenders and PEFT alone")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = SIZES[args.size]
    steps = args.steps or {"tiny": 60, "small": 6}[args.size]
    if args.worker:
        print(json.dumps(work(args.worker, size, steps)))
        return
    torch_names = ["peft_lora", *(ADAPTERS if args.adapters_python else ())]
    compiled = [f"{name}_compiled" for name in torch_names if args.compile]
    names = [*OURS, *torch_names, *compiled]
    for name in args.only:
        if name not in names:
            parser.error(f"--only: no contender {name!r}; there are {', '.join(names)}")
    names = [name for name in names if not args.only or name in (*args.only, "peft_lora")]
    report: dict[str, Any] = {
        "size": args.size,
        **size,
        "rank": RANK,
        "bottleneck": BOTTLENECK,
        "threads": threads(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "rounds": args.rounds,
        "steps": steps,
        "load_average": [round(os.getloadavg()[0], 1)],
    }
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(args.rounds):
        for name in names:
            print(f"round {number + 1} of {args.rounds}: {name}", file=sys.stderr)
            python = args.adapters_python if name.startswith("adapters") else sys.executable
            results[name].append(run(name, args.size, steps, python))
    report["load_average"].append(round(os.getloadavg()[0], 1))
    report["results"] = summarize(results, size["batch"] * (size["inputs"] + size["targets"]))
    if not args.adapters_python:
        report["adapters"] = ADAPTERS_NOTE
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
