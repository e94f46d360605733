"""The whole way on the embedded backbone and suite, as `make demo` runs it.

Trains an expert for every training task of `mini` and a multitask baseline of the same budget,
builds the library, evaluates on the training tasks' test examples and on the unseen tasks, merges
two experts, compares, and writes the report.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from pathlib import Path

from elm_jax.cli.main import main as elm_jax

# Few steps on a small model: small batches and no dropout learn most from them.
STEPS = 100
BATCH_SIZE = 4
MULTITASK_BATCH_SIZE = 32
LEARNING_RATE = "2e-3"


def run(command: str) -> float:
    """Prints and runs an `elm-jax` command; returns its seconds, exits if it fails."""
    print(f"\n$ elm-jax {command}", flush=True)
    started = time.perf_counter()
    status = elm_jax(shlex.split(command))
    if status:
        sys.exit(status)
    return time.perf_counter() - started


def means(results: Path) -> None:
    """Prints the mean score of each strategy."""
    for path in sorted((results / "strategies").glob("*.json")):
        strategy = json.loads(path.read_text())
        print(f"  {strategy['name']:<16} {100 * strategy['mean']:5.1f}")


def demo(output: Path) -> None:
    """Runs the commands; `output` is replaced."""
    from elm_jax.data import mini

    shutil.rmtree(output, ignore_errors=True)
    store, library = output / "store", output / "library"
    results, seen = output / "results", output / "results-seen"
    experts = len(mini.train_tasks())
    training = (
        f"--learning-rate {LEARNING_RATE} --schedule linear --dropout-rate 0 "
        "--feature-lengths inputs=64"  # few shapes to compile
    )
    scoring = f"--store {store} --library {library} --max-targets-length 16"
    # The same number of examples in larger batches, which two cores get through faster.
    multitask_steps = STEPS * experts * BATCH_SIZE // MULTITASK_BATCH_SIZE
    seconds = {
        "train experts": run(
            f"train --tasks mini:train --expert full --store {store} --steps {STEPS} "
            f"--batch-size {BATCH_SIZE} --experts-per-step 5 {training} --instances-per-expert 50"
        ),
        "train multitask": run(
            f"train --tasks mini:train --multitask multitask --expert full --store {store} "
            f"--steps {multitask_steps} --batch-size {MULTITASK_BATCH_SIZE} {training}"
        ),
        "library": run(f"library build {store} --output {library}"),
        "merge": run(f"merge {store} sentiment_novel sentiment_holiday --output-id merged"),
        "evaluate, seen": run(
            f"evaluate --tasks mini:train {scoring} --output {seen} --max-examples 40 "
            "--with none random multitask own retrieved"
        ),
        "compare, seen": run(f"compare {seen} --baseline random --group all"),
        "evaluate": run(
            f"evaluate --tasks mini:unseen {scoring} --output {results} --max-examples 50 "
            "--with all none random multitask merged retrieved oracle"
        ),
        "compare": run(f"compare {results} --baseline random"),
        "report": run(f"report {results} --output {output / 'report'}"),
    }
    print(f"\nmean score over test examples of the {experts} training tasks")
    means(seen)
    choices = json.loads((seen / "strategies" / "retrieved.json").read_text())["tasks"]
    hits = sum(choice["expert"] == choice["task"] for choice in choices)
    print(f"retrieval chose the task's own expert for {hits} of them")
    print("\nmean score over the unseen tasks")
    means(results)
    print("\nseconds taken")
    for name, value in seconds.items():
        print(f"  {name:<16} {value:5.0f} s")
    print(f"  {'all':<16} {sum(seconds.values()):5.0f} s")
    print(f"\nOpen {output / 'report' / 'index.html'} in a browser.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    demo(parser.parse_args().output)
