"""Measures generation against Hugging Face transformers on the same weights, and prints JSON.

Random weights and tokens, inputs without padding. The end of sequence is suppressed, so that every
row decodes all its tokens; a call is timed as a whole, the encoder included. Each contender runs in
a process of its own; they take turns, one at work at a time, and the others wait without spinning.
  ours: elm_jax.decoding.generate;
  transformers: T5ForConditionalGeneration.generate in PyTorch (on CUDA where both find a GPU).
The tokens of the contenders are compared; how many rows are equal is reported.

Example:
  python benchmarks/decode.py --size small --batch 16 --new-tokens 64 --ways greedy beam4
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(emb_dim=64, num_heads=4, head_dim=16, mlp_dim=128, layers=2, vocab_size=512),
    "small": dict(emb_dim=512, num_heads=8, head_dim=64, mlp_dim=2048, layers=6),
    "base": dict(emb_dim=768, num_heads=12, head_dim=64, mlp_dim=3072, layers=12),
    "large": dict(emb_dim=1024, num_heads=16, head_dim=64, mlp_dim=4096, layers=24),
    "xl": dict(emb_dim=1024, num_heads=32, head_dim=128, mlp_dim=16384, layers=24),
}
"""T5 1.0: relu, the embedding tied."""
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam4": {"num_beams": 4},
    "sample": {"do_sample": True},
    "top_p": {"do_sample": True, "top_p": 0.9},
}
CONTENDERS = ("ours", "transformers")
Generator = Callable[[dict[str, Any], np.ndarray, int], np.ndarray]
"""(options of a way, tokens int32 [B, T], new tokens) -> int32 [B, new tokens]."""


def make_config(size: str, dtype: str) -> Any:
    """Returns the T5Config of a size."""
    from elm_jax.models import T5Config

    sizes = dict(SIZES[size])
    layers = sizes.pop("layers")
    return T5Config(
        **{"vocab_size": 32_128} | sizes,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        mlp_activations=("relu",),
        logits_via_embedding=True,
        dtype=dtype,
    )


def matmul_flops(config: Any, batch: int, length: int, new: int, hypotheses: int) -> float:
    """Returns the floating point operations of a call's matrix products, attention left out."""
    attention = 4 * config.emb_dim * config.num_heads * config.head_dim
    feed_forward = 2 * config.emb_dim * config.mlp_dim
    encoder = config.num_encoder_layers * (attention + feed_forward)
    made_once = config.num_decoder_layers * attention // 2  # keys and values of the encoder
    decoder = config.num_decoder_layers * (attention + attention // 2 + feed_forward)
    decoder += config.emb_dim * config.vocab_size
    return 2.0 * batch * (length * (encoder + made_once) + new * hypotheses * decoder)


def ours(folder: Path, dtype: str) -> tuple[Generator, str]:
    """Returns our generator over the weights of a folder, and the device it runs on."""
    import jax

    from elm_jax.checkpoints import load_backbone
    from elm_jax.decoding import GenerationConfig, generate
    from elm_jax.models import T5

    backbone = load_backbone(folder)
    model = T5(backbone.config.replace(dtype=dtype))
    params = jax.device_put(jax.tree.map(lambda x: x.astype(dtype), backbone.params))

    def run(options: dict[str, Any], tokens: np.ndarray, new: int) -> np.ndarray:
        config = GenerationConfig(max_new_tokens=new, min_new_tokens=new, **options)
        key = jax.random.key(0) if config.do_sample else None
        return np.asarray(generate(model, {"params": params}, tokens, config, key).tokens[:, 0])

    return run, str(jax.devices()[0])


def transformers(folder: Path, dtype: str) -> tuple[Generator, str]:
    """Returns PyTorch's generator over the weights of a folder, and the device it runs on."""
    import torch
    from transformers import T5ForConditionalGeneration

    torch.set_num_threads(processors())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype)
    model = T5ForConditionalGeneration.from_pretrained(folder, dtype=kind).eval().to(device)

    def run(options: dict[str, Any], tokens: np.ndarray, new: int) -> np.ndarray:
        source = torch.from_numpy(tokens).long().to(device)
        limits = {"max_new_tokens": new, "min_new_tokens": new}
        whole = {"top_k": 0} if options.get("do_sample") else {}
        with torch.inference_mode():
            out = model.generate(
                input_ids=source,
                attention_mask=torch.ones_like(source),
                **{"num_beams": 1, "do_sample": False} | whole | limits | options,
            )
        return out[:, 1:].cpu().numpy()

    return run, device


def processors() -> int:
    """Returns how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def work(name: str, folder: Path, dtype: str) -> None:
    """A contender: a JSON line in, a call, a JSON line out."""
    run, device = {"ours": ours, "transformers": transformers}[name](folder, dtype)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints goes elsewhere
    print(json.dumps({"device": device}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        tokens = np.array(order["tokens"], np.int32)
        start = time.perf_counter()
        out = run(order["options"], tokens, order["new"])
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": out.tolist()}), file=answers, flush=True)


class Contender:
    """A process that runs `work`."""

    def __init__(self, name: str, folder: Path, dtype: str) -> None:
        command = [sys.executable, __file__, "--worker", name, "--folder", str(folder)]
        self.process = subprocess.Popen(
            [*command, "--dtype", dtype], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.device = self._answer()["device"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a contender ended with status {self.process.wait()}")
        return json.loads(line)

    def __call__(self, options: dict[str, Any], tokens: np.ndarray, new: int) -> dict[str, Any]:
        """Returns the seconds of a call, and its tokens."""
        assert self.process.stdin is not None
        order = {"options": options, "tokens": tokens.tolist(), "new": new}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(
    contenders: dict[str, Contender], way: str, tokens: np.ndarray, new: int, repeats: int
) -> dict[str, Any]:
    """Times the contenders in turns, after one call of each to warm up and compare tokens."""
    options = WAYS[way]
    first = {name: run(options, tokens, new) for name, run in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats):
        print(f"  repeat {repeat + 1} of {repeats}", file=sys.stderr)
        for name, run in contenders.items():
            times[name].append(run(options, tokens, new)["seconds"])
    median = {name: statistics.median(t) for name, t in times.items()}
    best = {name: min(t) for name, t in times.items()}
    decoded = len(tokens) * new
    result: dict[str, Any] = {
        "way": way,
        "first_call_s": {n: round(f["seconds"], 2) for n, f in first.items()},
        "seconds": {n: [round(s, 3) for s in t] for n, t in times.items()},
        "tokens_per_s": {n: round(decoded / t, 1) for n, t in median.items()},
        "tokens_per_s_best": {n: round(decoded / t, 1) for n, t in best.items()},
        "ms_per_step": {n: round(1000 * t / new, 2) for n, t in median.items()},
    }
    others = [name for name in contenders if name != "ours"]
    result["times_faster_than"] = {n: round(median[n] / median["ours"], 2) for n in others}
    result["times_faster_than_best"] = {n: round(best[n] / best["ours"], 2) for n in others}
    if not options.get("do_sample"):
        found = {n: np.array(f["tokens"]) for n, f in first.items()}
        equal = {n: (found[n] == found["ours"]).all(axis=1).sum() for n in others}
        result["equal_rows"] = {n: f"{count} of {len(tokens)}" for n, count in equal.items()}
    return result


def main() -> None:
    """Prints the measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=["greedy", "beam4"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, help="of the device: adds the utilisation")
    parser.add_argument("--no-transformers", action="store_true", help="measure ours alone")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.folder, args.dtype)
        return

    from elm_jax.checkpoints import initialize, to_huggingface

    config = make_config(args.size, args.dtype)
    names = ["ours"] if args.no_transformers else list(CONTENDERS)
    report: dict[str, Any] = {
        "size": args.size,
        "dtype": args.dtype,
        "batch": args.batch,
        "input_tokens": args.input_tokens,
        "new_tokens": args.new_tokens,
        "processors": processors(),
        "repeats": args.repeats,
        "load_average": [round(os.getloadavg()[0], 1)],
        "results": [],
    }
    rng = np.random.default_rng(0)
    shape = (args.batch, args.input_tokens)
    tokens = rng.integers(2, config.vocab_size, shape).astype(np.int32)
    with TemporaryDirectory() as folder:
        path = to_huggingface(initialize(config, seed=0), Path(folder) / "backbone")
        contenders = {name: Contender(name, path, args.dtype) for name in names}
        report["devices"] = {name: c.device for name, c in contenders.items()}
        for way in args.ways:
            print(way, file=sys.stderr)
            result = measure(contenders, way, tokens, args.new_tokens, args.repeats)
            beams = WAYS[way].get("num_beams", 1)
            flops = matmul_flops(config, args.batch, args.input_tokens, args.new_tokens, beams)
            median = statistics.median(result["seconds"]["ours"])
            result["ours_tflops_per_s"] = round(flops / median / 1e12, 3)
            if args.peak_tflops:
                used = flops / median / 1e12 / args.peak_tflops
                result["ours_flops_utilisation"] = round(used, 4)
            report["results"].append(result)
        for contender in contenders.values():
            contender.close()
    report["load_average"].append(round(os.getloadavg()[0], 1))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
