"""Measures a batch whose examples use different LoRA experts against one expert, and prints JSON.

The same weights in elm_jax and in PEFT (`adapter_names=`), on the same inputs, interleaved, in one
process; random weights and tokens, inputs without padding. Two kinds of work:
  scoring: the log-likelihood of a target of --target-tokens tokens;
  generation: --new-tokens new tokens, greedy, none of which may end a sequence.
Each is done with one expert for the whole batch, and with --experts experts, each for as many
examples, in no order. Results of elm_jax and PEFT are compared; log-likelihoods further apart than
--tolerance are an error. `--forms` also times each form of a mixed batch (see
`elm_jax.experts.routing`), and `--adapter` does so for bottleneck adapters, which PEFT has not.

Example:
  python benchmarks/mixed_batch.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np

from elm_jax.checkpoints import Backbone, initialize, to_huggingface
from elm_jax.decoding import (
    GenerationConfig,
    choice_log_probs,
    generate,
    mixed_choice_log_probs,
    mixed_generate,
)
from elm_jax.experts import expert_shapes
from elm_jax.experts.peft import save_peft_expert
from elm_jax.models import T5, ExpertSpec, T5Config, get_spec

SIZES = {
    "tiny": T5Config(512, 64, 4, 16, 128, 2, 2),
    "small": T5Config(32_128, 512, 8, 64, 2048, 6, 6, ("relu",), logits_via_embedding=True),
    "small_1_1": T5Config(32_128, 512, 6, 64, 1024, 8, 8),
    "large": T5Config(32_128, 1024, 16, 64, 2816, 24, 24),
}
Work = Callable[[], np.ndarray]
"""Does all of one kind of work and returns its result."""


def draw_experts(config: T5Config, spec: ExpertSpec, count: int) -> Any:
    """Draws experts that change the result, stacked [X, ...]."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda s: rng.normal(0, 0.05, (count, *s.shape)).astype(np.float32),
        expert_shapes(config, spec),
    )


def our_work(
    backbone: Backbone,
    spec: ExpertSpec,
    experts: Any,
    places: np.ndarray,
    inputs: np.ndarray,
    targets: np.ndarray,
    new_tokens: int,
    forms: tuple[str, ...],
) -> dict[str, dict[str, Work]]:
    """Returns ours by kind of work and name."""
    model, params = T5(backbone.config, spec), jax.device_put(backbone.params)
    stack = jax.device_put(experts)
    one = {"params": params, "expert": jax.tree.map(lambda x: x[0], stack)}
    config = GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    choices = targets[:, None]
    given = (model, params, stack, places, inputs)

    def scored(form: str) -> Work:
        return lambda: np.asarray(mixed_choice_log_probs(*given, choices, form=form)[0][:, 0])

    def generated(form: str) -> Work:
        return lambda: np.asarray(mixed_generate(*given, config, form=form).tokens[:, 0])

    scoring: dict[str, Work] = {
        "ours_one": lambda: np.asarray(choice_log_probs(model, one, inputs, choices)[0][:, 0]),
        "ours_mixed": scored("auto"),
    }
    generation: dict[str, Work] = {
        "ours_one": lambda: np.asarray(generate(model, one, inputs, config).tokens[:, 0]),
        "ours_mixed": generated("auto"),
    }
    for form in forms:
        scoring[f"ours_{form}"], generation[f"ours_{form}"] = scored(form), generated(form)
    return {"scoring": scoring, "generation": generation}


def peft_work(
    backbone: Backbone,
    spec: ExpertSpec,
    experts: Any,
    places: np.ndarray,
    inputs: np.ndarray,
    targets: np.ndarray,
    new_tokens: int,
    threads: int,
) -> dict[str, dict[str, Work]]:
    """Returns PEFT's with the same weights."""
    import torch
    from peft import PeftModel
    from transformers import T5ForConditionalGeneration

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with TemporaryDirectory() as folder:
        base = T5ForConditionalGeneration.from_pretrained(
            to_huggingface(backbone, Path(folder) / "backbone")
        )
        for x in range(int(places.max()) + 1):
            expert = jax.tree.map(lambda leaf, x=x: leaf[x], experts)
            saved = str(save_peft_expert(spec, expert, Path(folder) / str(x)))
            if x == 0:
                model = PeftModel.from_pretrained(base, saved, adapter_name="0")
            else:
                model.load_adapter(saved, adapter_name=str(x))
    model.eval().to(device)
    source = torch.from_numpy(inputs).long().to(device)
    labels = torch.from_numpy(targets).long().to(device)
    mask = torch.ones_like(source)

    def score(**names: Any) -> np.ndarray:
        with torch.inference_mode():
            decoded = torch.nn.functional.pad(labels, (1, 0))[:, :-1]
            logits = model(
                input_ids=source, attention_mask=mask, decoder_input_ids=decoded, **names
            ).logits
            picked = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
            return picked.sum(-1).cpu().numpy()

    def generate_all(**names: Any) -> np.ndarray:
        with torch.inference_mode():
            tokens = model.generate(
                input_ids=source,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                **names,
            )
        return tokens[:, 1:].cpu().numpy()

    mixed = {"adapter_names": [str(place) for place in places]}
    return {
        "scoring": {"peft_one": score, "peft_mixed": lambda: score(**mixed)},
        "generation": {"peft_one": generate_all, "peft_mixed": lambda: generate_all(**mixed)},
    }


def measure(work: dict[str, Work], batch: int, repeats: int) -> tuple[dict[str, Any], Any]:
    """Times each in turns after a first call; returns numbers and the first call's results."""
    results, seconds = {}, {name: [] for name in work}
    for name, run in work.items():
        print(f"  {name}", file=sys.stderr)
        results[name] = run()
    names = list(work)
    for repeat in range(repeats):
        print(f"  repeat {repeat + 1} of {repeats}", file=sys.stderr)
        for name in names if repeat % 2 == 0 else reversed(names):
            begun = time.perf_counter()
            work[name]()
            seconds[name].append(time.perf_counter() - begun)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    best = {name: min(times) for name, times in seconds.items()}
    numbers: dict[str, Any] = {
        "seconds": {name: round(t, 4) for name, t in median.items()},
        "seconds_best": {name: round(t, 4) for name, t in best.items()},
        "examples_per_s": {name: round(batch / t, 2) for name, t in median.items()},
        "mixed_to_one": {
            name: round(median[name] / median[f"{name.partition('_')[0]}_one"], 3)
            for name in names
            if not name.endswith("_one")
        },
        "mixed_to_one_best": {
            name: round(best[name] / best[f"{name.partition('_')[0]}_one"], 3)
            for name in names
            if not name.endswith("_one")
        },
    }
    if "peft_mixed" in work:
        numbers["times_faster_than_peft"] = {
            kind: round(median[f"peft_{kind}"] / median[f"ours_{kind}"], 2)
            for kind in ("one", "mixed")
        }
    return numbers, results


def main() -> None:
    """Prints the measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--adapter", type=int, metavar="E", help="bottleneck adapters, not LoRA")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--target-tokens", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--kinds", nargs="+", default=["scoring", "generation"])
    parser.add_argument("--forms", nargs="+", default=[], choices=("gathered", "grouped"))
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--tolerance", type=float, default=1e-2, help="of a log-likelihood")
    args = parser.parse_args()
    config = SIZES[args.size].replace(dtype=args.dtype)
    spec = (
        get_spec("adapter", bottleneck=args.adapter)
        if args.adapter
        else get_spec("lora", rank=args.rank)
    )
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rng = np.random.default_rng(0)
    drawn = [
        rng.integers(2, config.vocab_size, (args.batch, length)).astype(np.int32)
        for length in (args.input_tokens, args.target_tokens)
    ]
    drawn[1][:, -1] = 1
    places = rng.permutation(np.arange(args.batch) % args.experts).astype(np.int32)
    shared = (
        initialize(config, seed=0),
        spec,
        draw_experts(config, spec, args.experts),
        places,
        *drawn,
        args.new_tokens,
    )
    work = our_work(*shared, tuple(args.forms))
    if not args.no_peft and not args.adapter:
        theirs = peft_work(*shared, threads or 1)
        work = {kind: work[kind] | theirs[kind] for kind in work}
    report: dict[str, Any] = {
        **{k: v for k, v in vars(args).items() if k not in ("tolerance", "no_peft", "kinds")},
        "threads": threads,
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "load_average": [round(os.getloadavg()[0], 1)],
    }
    worst = 0.0
    for kind in args.kinds:
        print(kind, file=sys.stderr)
        report[kind], results = measure(work[kind], args.batch, args.repeats)
        pairs = (
            [(name, name.replace("ours", "peft")) for name in ("ours_one", "ours_mixed")]
            if "peft_mixed" in results
            else [("ours_mixed", f"ours_{form}") for form in args.forms]
        )
        for one, other in pairs:
            if kind == "scoring":
                difference = float(np.abs(results[one] - results[other]).max())
                report[kind].setdefault("max_abs_diff", {})[f"{one}_{other}"] = difference
                worst = max(worst, difference)
            else:
                same = float((results[one] == results[other]).mean())
                report[kind].setdefault("same_tokens", {})[f"{one}_{other}"] = same
    report["load_average"].append(round(os.getloadavg()[0], 1))
    print(json.dumps(report, indent=2))
    if not worst <= args.tolerance:
        sys.exit(f"log-likelihoods differ by {worst}, more than --tolerance {args.tolerance}")


if __name__ == "__main__":
    main()
