"""`elm-jax evaluate`: scores a backbone with none, one, all or retrieved experts on tasks."""

from __future__ import annotations

import argparse
from typing import Any

from elm_jax.cli import common


def add_parser(subparsers: Any) -> None:
    """Adds `evaluate`."""
    parser = common.command(
        subparsers,
        "evaluate",
        help="score tasks with none, all, the oracle's, retrieved, random or one expert",
        example="elm-jax evaluate --backbone elm-tiny --store store --tasks 'tasks/*' "
        "--with retrieved --library library --output results",
    )
    parser.add_argument("--backbone", default="elm-tiny", help="name or folder (%(default)s)")
    parser.add_argument("--store", help="folder of experts; not needed for --with none")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="PATTERN")
    parser.add_argument(
        "--with",
        dest="with_",
        nargs="+",
        default=["none"],
        metavar="WITH",
        help="none, all, oracle, retrieved, random, or the id of an expert; several at once",
    )
    parser.add_argument("--library", metavar="LIB", help="expert library, for --with retrieved")
    parser.add_argument("--embedder", help="name or folder, if the library's cannot be found")
    parser.add_argument("--output", required=True, metavar="RESULTS")
    how = parser.add_argument_group("scoring")
    how.add_argument("--split", default="test")
    how.add_argument("--per", choices=("task", "prompt"), default="task", help="one score a ...")
    how.add_argument("--answer-choices", choices=("given", "auto", "none"), default="given")
    how.add_argument(
        "--mean-log-prob",
        action="store_true",
        help="rank choices by the mean log-probability of their tokens, not by the sum",
    )
    how.add_argument("--generation-metric", default="rouge_l", help="rouge_l or exact_match")
    how.add_argument("--batch-size", type=int, default=32)
    how.add_argument("--experts-per-batch", type=int, default=8, metavar="X")
    how.add_argument("--max-inputs-length", type=int, default=512, metavar="T")
    how.add_argument("--max-targets-length", type=int, default=128, metavar="U")
    how.add_argument("--max-examples", type=int, metavar="N", help="examples per task")
    how.add_argument("--queries", type=int, default=32, metavar="Q", help="instances that vote")
    how.add_argument("--seed", type=int, default=0, help="of queries and random experts")
    how.add_argument("--vocabulary", help="SentencePiece model, if not the backbone's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluates what the arguments say."""
    from elm_jax.checkpoints.backbone import load_backbone
    from elm_jax.data.examples import find_tasks
    from elm_jax.errors import ElmError
    from elm_jax.evaluation.evaluate import EvaluationOptions, Evaluator
    from elm_jax.experts import ExpertStore
    from elm_jax.training.experts import backbone_vocabulary

    options = EvaluationOptions(
        split=args.split,
        per=args.per,
        answer_choices=args.answer_choices,
        mean_log_prob=args.mean_log_prob,
        generation_metric=args.generation_metric,
        batch_size=args.batch_size,
        experts_per_batch=args.experts_per_batch,
        max_inputs_length=args.max_inputs_length,
        max_targets_length=args.max_targets_length,
        max_examples=args.max_examples,
        queries=args.queries,
        seed=args.seed,
    )
    store = ExpertStore(args.store) if args.store else None
    if store is None and args.with_ != ["none"]:
        raise ElmError(f"--with {' '.join(args.with_)} needs --store")
    library = embedder = None
    if "retrieved" in args.with_:
        if not args.library:
            raise ElmError("--with retrieved needs --library (made by `elm-jax library build`)")
        from elm_jax.retrieval import Library, load_embedder

        library = Library.load(args.library)
        embedder = load_embedder(args.embedder or library.space.name)
    backbone = load_backbone(args.backbone)
    bar = common.ProgressBar("scores", hide=args.json)
    try:
        evaluator = Evaluator(
            backbone,
            backbone_vocabulary(backbone, args.vocabulary),
            find_tasks(args.tasks),
            args.output,
            store=store,
            options=options,
            report=bar.update,
        )
        strategies = [evaluator.run(with_, library, embedder) for with_ in args.with_]
    finally:
        bar.close()
    if args.json:
        import dataclasses

        common.print_json([dataclasses.asdict(s) for s in strategies if s is not None])
        return 0
    for with_, strategy in zip(args.with_, strategies, strict=True):
        if strategy is None:
            print(f"{with_}: {len(evaluator.units)} tasks scored, see {args.output}")
            continue
        print(f"\nwith {with_}: mean {100 * (strategy.mean or 0):.1f}")
        common.print_table(
            ("task", "expert", "metric", "score", "votes"),
            [
                (
                    c.task,
                    c.expert,
                    c.metric,
                    f"{100 * c.score:.1f}",
                    f"{c.votes[c.expert]}/{c.queries}" if c.votes else "-",
                )
                for c in strategy.tasks
            ],
        )
    return 0
