"""The report: its tables' numbers, its figures' form, and a page that stands alone."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import html.parser
import io
import json
import random
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from elm_jax.cli import report as cli
from elm_jax.evaluation import figures, tables
from elm_jax.evaluation.report import write_report
from elm_jax.evaluation.results import (
    Choice,
    ExpertSummary,
    Results,
    Score,
    Strategy,
    TaskSummary,
    write_experts,
    write_score,
    write_strategy,
    write_tasks,
)

BACKBONE = {"name": 't5-small <lm> & "adapt"', "fingerprint": "sha256:0f1e2d3c4b5a69788796a5b4"}
KINDS = ("sentiment", "topic", "entailment", "coreference", "extraction", "rewriting")
PLACES = (
    "letters", "voyages", "recipes", "sermons", "ballads", "ledgers", "trials", "gardens",
    "markets", "storms", "schools", "horses", "taverns", "harbours", "fevers", "clocks", "mills",
    "orchards", "furnaces", "theatres", "islands", "prisons", "bridges", "winters", "weddings",
)  # fmt: skip
STRATEGIES = ("none", "random", "multitask", "retrieved", "oracle", "merged")
EVIL = "<script>alert(\"x\")</script> & 'co'"


def synthetic(
    path: Path, *, experts: int = 31, unseen: int = 8, seen: int = 16, seed: int = 0
) -> Path:
    """Writes results shaped like a real run's: related kinds help, others hurt a little."""
    rng = random.Random(seed)
    names = [f"{KINDS[i % 6]} of {place}" for i, place in enumerate(PLACES)]
    tasks, none = [], {}
    for i in range(unseen + seen):
        name = names[i % len(names)] + (f" {i // len(names)}" if i >= len(names) else "")
        if i == 1:
            name = f"sentiment of {EVIL}"
        generated = KINDS[i % 6] in ("extraction", "rewriting")
        choices = None if generated else rng.choice([2, 2, 3, 4])
        chance = None if choices is None else 1 / choices
        tasks.append(
            TaskSummary(
                name,
                examples=100,
                metric="rouge_l" if generated else "accuracy",
                choices=choices,
                group="unseen" if i < unseen else "seen",
                chance=chance,
                majority=None if chance is None else round(chance + rng.uniform(0, 0.08), 2),
            )
        )
        none[name] = round((chance or 0.12) + rng.uniform(-0.02, 0.08), 2)
    home = tasks[unseen:] or tasks
    summaries, kinds = [], {}
    for i in range(experts):
        task = home[i % len(home)].name
        ident = f"{task.replace(' ', '_')}/prompt_{i // len(home) + 1}"
        kinds[ident] = task.split()[0]
        start, rate = rng.uniform(2.5, 4.5), rng.uniform(0.015, 0.06)
        history = [
            {"step": s, "loss": 0.2 + start * 2.7 ** (-rate * s) + rng.uniform(0, 0.12),
             "accuracy": min(1.0, 0.3 + rate * s / 12)}
            for s in range(0, 201, 5)
        ]  # fmt: skip
        summaries.append(
            ExpertSummary(ident, "lora" if i % 5 == 4 else "adapter", (task,), (f"p{i}",), 99_328,
                          False, tuple(history), {"steps": 200, "batch_size": 32})
        )  # fmt: skip
    history = tuple({"step": s, "loss": 1.1 + 3 * 0.985**s} for s in range(0, 201, 5))
    everything = tuple(t.name for t in home)
    summaries.append(
        ExpertSummary("multitask", "adapter", everything, ("p",), 99_328, True, history)
    )
    settings = {"queries": 32, "batch_size": 64, "lengths": [256, 64]}
    by_task: dict[str, dict[str, Score]] = {}
    for task in tasks:
        kind = task.name.split()[0]
        for expert in ["none", *kinds, "multitask"]:
            score = none[task.name]
            if expert == "multitask":
                score += rng.uniform(0.02, 0.18)
            elif expert != "none":
                own = expert.startswith(task.name.replace(" ", "_"))
                score += rng.gauss(0.3 if own else 0.16 if kinds[expert] == kind else -0.01, 0.04)
            value = round(min(max(score, 0.0), 1.0), 2)
            prompts = {"p1": {"score": value, "examples": 50}}
            made = Score(
                task.name, expert, task.metric, value, 100, "rank", prompts, settings, BACKBONE, 1.5
            )
            by_task.setdefault(task.name, {})[expert] = made
            write_score(path, made)
    strategies: dict[str, list[Choice]] = {name: [] for name in STRATEGIES}
    for task in tasks:
        scores = by_task[task.name]
        pool = sorted(kinds, key=lambda e: -scores[e].score)
        chosen = pool[min(int(rng.expovariate(0.5)), len(pool) - 1)]
        rest = rng.sample(pool, min(5, len(pool)))
        votes = {chosen: 17}
        for i in range(15):
            other = rest[int(i**0.5) % len(rest)]
            votes[other] = votes.get(other, 0) + 1
        picks = {"none": "none", "random": rng.choice(pool), "multitask": "multitask",
                 "retrieved": chosen, "oracle": pool[0]}  # fmt: skip
        for name, expert in picks.items():
            extra = {}
            if name == "retrieved":
                extra = {"votes": votes, "queries": 32, "similarity": dict.fromkeys(votes, 0.61)}
            strategies[name].append(
                Choice(task.name, expert, scores[expert].score, task.metric, **extra)
            )
        blend = round((scores[chosen].score + scores["multitask"].score) / 2, 2)
        strategies["merged"].append(Choice(task.name, "merged", blend, task.metric))
    for name, choices in strategies.items():
        write_strategy(path, Strategy(name, BACKBONE, 3, tuple(choices)))
    write_experts(path, summaries)
    write_tasks(path, tasks)
    return path


HAND = {  # task: {expert: score}
    "u1": {"none": 0.4, "a": 0.6, "b": 0.2, "m": 0.5},
    "u2": {"none": 0.2, "a": 0.1, "b": 0.5, "m": 0.3},
    "s1": {"none": 0.3, "a": 0.9, "b": 0.3, "m": 0.5},
}


def small_strategy(name: str, picks: dict[str, str], **votes: dict[str, int]) -> Strategy:
    choices = [
        Choice(task, expert, HAND[task][expert], "accuracy", votes.get(task),
               None, sum(votes[task].values()) if task in votes else None)
        for task, expert in picks.items()
    ]  # fmt: skip
    return Strategy(name, BACKBONE, 0, tuple(choices))


@pytest.fixture
def hand(tmp_path: Path) -> Path:
    """Results small enough to work out by hand; "none", "multitask" and "oracle" follow."""
    path = tmp_path / "hand"
    for task, row in HAND.items():
        for expert, value in row.items():
            write_score(path, Score(task, expert, "accuracy", value, 100, "rank", {}, {}, BACKBONE))
    write_strategy(path, small_strategy("random", {"u1": "b", "u2": "a", "s1": "b"}))
    votes = {"u1": {"a": 3, "b": 1}, "u2": {"a": 2, "b": 2}, "s1": {"a": 4}}
    write_strategy(path, small_strategy("retrieved", {"u1": "a", "u2": "a", "s1": "a"}, **votes))
    history = ({"step": 1, "loss": 2.0, "accuracy": 0.1}, {"step": 9, "loss": 0.5, "accuracy": 0.8})
    experts = [ExpertSummary("a", "lora", ("s1",), ("p", "q"), 1234, False, history)]
    experts.append(ExpertSummary("b", "adapter", ("s2",), ("p",), 99, False))
    experts.append(ExpertSummary("m", "adapter", ("s1", "s2", "s3"), ("p",), 99, True))
    write_experts(path, experts)
    write_tasks(
        path,
        [
            TaskSummary("s1", 100, "accuracy", 2, "seen", 0.5, 0.6),
            TaskSummary("u1", 100, "accuracy", 2, "unseen", 0.5, 0.5),
            TaskSummary("u2", 100, "accuracy", 4, "unseen", 0.25, 0.25),
        ],
    )
    return path


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic(tmp_path_factory.mktemp("synthetic"))


def rounded(rows: tuple[tuple[tables.Value, ...], ...]) -> list[tuple[tables.Value, ...]]:
    return [tuple(round(v, 9) if isinstance(v, float) else v for v in row) for row in rows]


def test_comparison_by_hand(hand: Path) -> None:
    table = tables.comparison(Results.load(hand))
    assert table is not None
    names = ["Task", "Group", "none", "random", "multitask", "retrieved", "oracle"]
    assert [column.name for column in table.columns] == names
    assert rounded(table.rows) == [
        ("u1", "unseen", 0.4, 0.2, 0.5, 0.6, 0.6),
        ("u2", "unseen", 0.2, 0.1, 0.3, 0.1, 0.5),
        ("s1", "seen", 0.3, 0.3, 0.5, 0.9, 0.9),
    ]
    assert rounded(table.footer) == [
        ("Mean of 2", "unseen", 0.3, 0.15, 0.4, 0.35, 0.55),
        ("Wins", "unseen", "0", "0", "1", "1", None),
        ("Mean of 1", "seen", 0.3, 0.3, 0.5, 0.9, 0.9),
        ("Wins", "seen", "0", "0", "0", "1", None),
    ]
    assert table.best == {(0, 5), (1, 4), (2, 5)}  # never the oracle


def test_ranking_by_hand(hand: Path) -> None:
    table = tables.ranking(Results.load(hand))
    assert table is not None
    assert rounded(table.rows) == [
        (1, "m", "adapter", 0.4, 0.1, 0, "3 tasks"),
        (2, "a", "lora", 0.35, 0.05, 1, "s1"),
        (3, "b", "adapter", 0.35, 0.05, 1, "s2"),
        (None, "none (bare backbone)", None, 0.3, None, 0, None),
    ]
    assert table.notes == (
        "None of the 2 single-task experts average above the multitask expert (40.0) on the "
        "unseen tasks.",
    )


def test_retrieval_by_hand(hand: Path) -> None:
    table = tables.retrieval(Results.load(hand))
    assert table is not None
    assert rounded(table.rows) == [
        ("u1", "unseen", "a", 3, 4, 0.6, "a", 3, 0.6, 0.0, 1, 2),
        ("u2", "unseen", "a", 2, 4, 0.1, "b", 2, 0.5, 0.4, 2, 2),
        ("s1", "seen", "a", 4, 4, 0.9, "a", 4, 0.9, 0.0, 1, 2),
    ]
    assert table.notes[0].startswith(
        "Retrieval chooses the best expert, or an equally good one, on 1 of 2 unseen tasks; "
        "on average it gives away 20.0 points"
    )


def test_experts_tasks_and_matrix_by_hand(hand: Path) -> None:
    results = Results.load(hand)
    experts, matrix = tables.experts(results), tables.matrix(results)
    assert experts is not None and matrix is not None
    assert experts.rows[0] == ("a", "lora", 1234, "s1", 2, 9, 2.0, 0.5, 0.8)
    assert experts.rows[1] == ("b", "adapter", 99, "s2", 1, None, None, None, None)
    assert tables.tasks(results).rows[0] == ("u1", "unseen", 100, "accuracy", 2, 0.5, 0.5, 0.4)
    assert matrix.rows[0] == ("m", 0.5, 0.3, 0.5) and len(matrix.rows) == 4


def test_findings_also_speak_against_retrieval(hand: Path) -> None:
    assert tables.findings(Results.load(hand)) == [
        "Retrieval scores 35.0 on average over 2 unseen tasks: 5.0 points above the bare backbone "
        "(30.0), 20.0 points above a random expert (15.0) and 5.0 points below the multitask "
        "expert (40.0).",
        # sqrt(0.6 * 0.4 / 100 + 0.1 * 0.9 / 100) / 2
        "The number of test examples alone makes that mean uncertain by 2.9 points (one standard "
        "error); smaller differences may be luck.",
        "Retrieval closes 20% of the gap between the bare backbone (30.0) and the best expert for "
        "each task (55.0, chosen with the test labels).",
        "Retrieval chooses the best expert, or an equally good one, on 1 of 2 unseen tasks; on "
        "average it gives away 20.0 points to the oracle.",
        "On the unseen tasks the chosen expert ranks 1.5 on average; a blind choice would rank "
        "1.5.",
        "The bare backbone beats retrieval on 1 of 2 unseen tasks: u2.",
        "The multitask expert beats retrieval on 1 of 2 unseen tasks: u2.",
        "Always giving the commonest answer beats retrieval on 1 of 2 unseen tasks: u2.",
        "Retrieval chooses an expert that was trained on the task itself for 1 of 1 seen task.",
        "None of the 2 single-task experts average above the multitask expert (40.0) on the "
        "unseen tasks.",
    ]


def test_ways_to_retrieve_are_summed_up(hand: Path) -> None:
    better = {"u1": "a", "u2": "b", "s1": "a"}
    for name, picks in (("retrieved:top3", better), ("retrieved:weighted", {"u1": "b", "u2": "a"})):
        write_strategy(hand, small_strategy(name, picks))
    write_strategy(hand, small_strategy("retrieved:first", {"u1": "a"}))  # not on the same tasks
    results = Results.load(hand)
    said = tables.findings(results)
    assert (
        "Of 2 other ways to retrieve 1 is above it; the best, as the test labels say, is "
        "retrieved:top3 (55.0)." in said
    )
    assert sum("retrieved:" in sentence for sentence in said) == 1
    assert "retrieved:top3" in figures.comparison(results, "unseen")
    for queries in range(1, 6):
        write_strategy(hand, small_strategy(f"retrieved:queries={queries}", better))
    crowded = figures.comparison(Results.load(hand), "unseen")
    assert "retrieved:top3" not in crowded and "retrieved" in crowded


def test_hits_on_seen_prompts(tmp_path: Path) -> None:
    """Of three seen prompts retrieval finds one's own expert, another prompt's, another task's."""
    chosen = {"s1/p": "s1--p", "s1/q": "s1--p", "s2/p": "s1--p"}
    experts = [
        ExpertSummary("s1--p", "lora", ("s1",), ("p",), 9, False),
        ExpertSummary("s2--p", "lora", ("s2",), ("p",), 9, False),
    ]
    write_experts(tmp_path, experts)
    write_tasks(
        tmp_path,
        [TaskSummary(n, 4, "accuracy", group="seen", parent=n.partition("/")[0]) for n in chosen],
    )
    choices = [Choice(task, name, 0.5, "accuracy") for task, name in chosen.items()]
    write_strategy(tmp_path, Strategy("retrieved", BACKBONE, 0, tuple(choices)))
    table = tables.retrieval(Results.load(tmp_path))
    assert table is not None and table.notes[-1] == (
        "Retrieval chooses an expert that was trained on the task itself for 2 of 3 seen prompts, "
        "and the prompt's own for 1."
    )


def test_means_cover_only_what_all_strategies_did(hand: Path) -> None:
    write_strategy(hand, small_strategy("random", {"u1": "b"}))
    table = tables.comparison(Results.load(hand))
    assert table is not None
    assert rounded(table.footer)[0] == ("Mean of 1", "unseen", 0.4, 0.2, 0.5, 0.6, 0.6)
    assert table.footer[2][3] is None  # nothing random among the seen tasks
    assert "Means are over the 1 of 2 unseen tasks that every column has." in table.notes


def test_text_is_aligned_and_fits(big: Path) -> None:
    for table in tables.all_tables(Results.load(big)):
        if table.name == "matrix":
            continue
        lines = table.to_text(110, max_rows=10).splitlines()
        rules = [line for line in lines if line.startswith("─")]
        assert len(set(rules)) == 1 and len(rules[0]) <= 110
        body = lines[1 : len(lines) - lines[::-1].index(rules[0])]
        assert all(len(line) <= len(rules[0]) for line in body)
        assert (f"… and {len(table.rows) - 10} more rows" in lines) == (len(table.rows) > 10)


def test_csv_and_json_keep_every_digit(hand: Path) -> None:
    table = tables.comparison(Results.load(hand))
    assert table is not None
    odd = dataclasses.replace(table, rows=(('a,"b"\n', "g", 1 / 3, None, 0.5, 0.5, 0.5),))
    read = list(csv.reader(io.StringIO(odd.to_csv())))
    assert read[0][:3] == ["Task", "Group", "none"]
    assert read[1][0] == 'a,"b"\n' and float(read[1][2]) == 1 / 3 and read[1][3] == ""
    again = json.loads(json.dumps(table.to_json()))
    assert again["rows"][0] == list(table.rows[0]) and again["columns"][2]["kind"] == "score"


def every_figure(results: Results) -> list[str]:
    made = [figures.heatmap(results), *figures.curves(results)]
    for width in (figures.WIDTH, figures.NARROW):
        made += [figures.ranking(results, width), figures.votes(results, width)]
        made += [figures.comparison(results, group, width) for group in results.groups]
    return made


def check_svg(svg: str) -> ET.Element:
    root = ET.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    labels = root.attrib["aria-labelledby"].split()
    named = {e.attrib["id"]: e.text for e in (root.find(f"{space}title"), root.find(f"{space}desc"))
             if e is not None}  # fmt: skip
    assert root.attrib["role"] == "img" and set(labels) == set(named) and all(named.values())
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for rect in root.iter(f"{space}rect"):
        x, y, w, h = (float(rect.attrib[k]) for k in ("x", "y", "width", "height"))
        assert (
            w > 0 and h > 0 and x >= -2 and y >= -2 and x + w <= width + 2 and y + h <= height + 2
        )
    return root


def test_figures_are_xml_with_text_alternatives(big: Path, hand: Path) -> None:
    for path in (big, hand):
        for svg in every_figure(Results.load(path)):
            if svg:
                check_svg(svg)
    assert all(every_figure(Results.load(big)))


def test_bars_are_as_long_as_scores(hand: Path) -> None:
    root = ET.fromstring(figures.ranking(Results.load(hand)))
    bars = [e for e in root.iter() if "mark" in e.attrib.get("class", "")]
    lengths = [float(bar.attrib["width"]) for bar in bars]
    assert lengths[1] == pytest.approx(lengths[0] * 0.35 / 0.4, abs=0.02)
    kinds = [bar.attrib["class"].split()[1] for bar in bars]
    assert kinds == ["f-multitask", "below", "below"]  # a and b, 35.0, lie below 40.0


def test_many_experts_fit_without_labels(tmp_path: Path) -> None:
    results = Results.load(synthetic(tmp_path, experts=70, unseen=2, seen=3))
    roots = [check_svg(svg) for svg in every_figure(results) if svg]
    assert len(figures.curves(results)) == 1  # one chart of all
    bars = [e for e in roots[2].iter() if "mark" in e.attrib.get("class", "")]
    assert len(bars) == 71


class Page(html.parser.HTMLParser):
    """Checks that tags balance and collects what matters: ids, links, resources, scripts."""

    VOID = frozenset({"meta", "link", "wbr", "br", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)
        self.close()
        assert not self.stack, self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in ("href", "src", "srcset", "action", "data"):
                self.links.append(value or "")
            if key.startswith("on"):
                self.handlers.append(key)
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack[-1] == tag, (self.stack[-3:], tag)
        self.stack.pop()


def check_page(path: Path) -> tuple[str, Page]:
    """Checks what must hold of every page: well-formed, self-contained, its links lead on."""
    text = path.read_text()
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    outside = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", outside)
    assert page.tags.count("script") == 1 and not page.handlers
    assert not {"img", "iframe", "object", "embed"} & set(page.tags)
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        elif link != "data:,":
            assert (path.parent / link).is_file(), link
    assert "NaN" not in text and ">nan<" not in text and ">None<" not in text
    return text, page


def test_page_of_a_real_size(big: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "report"
    path = write_report(big, out, date="2025-01-02")
    assert Path(path) == out / "index.html"
    text, page = check_page(Path(path))
    assert "2025-01-02" in text and "32 experts" in text and "24 tasks (8 unseen, 16 seen)" in text
    sections = ["findings", "comparison", "ranking", "retrieval", "matrix", "experts", "tasks",
                "method"]  # fmt: skip
    assert [i for i in page.ids if i in sections] == sections
    for table in tables.all_tables(Results.load(big)):
        assert (out / "tables" / f"{table.name}.csv").read_text() == table.to_csv()
        assert json.loads((out / "tables" / f"{table.name}.json").read_text())["name"] == table.name
    assert not [p for p in out.rglob("*") if p.name.startswith(".")]


def test_page_escapes_every_name(big: Path, tmp_path: Path) -> None:
    text, page = check_page(Path(write_report(big, tmp_path)))
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    assert "<lm>" not in text and "t5-small &lt;lm&gt; &amp; &quot;adapt&quot;" in text
    assert "lm" not in page.tags


def test_control_characters_stay_out_of_xml(hand: Path) -> None:
    data = json.loads((hand / "experts.json").read_text())
    data["experts"][0]["id"] = "bad\x07\ud800 id"
    (hand / "experts.json").write_text(json.dumps(data))
    assert all(ET.fromstring(svg) is not None for svg in every_figure(Results.load(hand)) if svg)


def drop(path: Path, *names: str) -> None:
    for name in names:
        target = path / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()


def only_none(path: Path) -> None:
    drop(path, "strategies")
    for file in (path / "scores").rglob("*.json"):
        if file.stem != "none":
            file.unlink()
    write_experts(path, [])


@pytest.mark.parametrize(
    "change, present, absent",
    [
        (lambda p: drop(p, "strategies/retrieved.json"), {"ranking"}, {"retrieval"}),
        (lambda p: drop(p, "strategies"), {"comparison", "ranking"}, {"retrieval"}),
        (lambda p: drop(p, "scores"), {"comparison", "retrieval"}, {"ranking", "matrix"}),
        (only_none, {"comparison", "tasks"}, {"ranking", "retrieval", "experts", "findings"}),
        (lambda p: write_tasks(p, [TaskSummary(t, 100, "accuracy") for t in HAND]),
         {"comparison", "ranking", "findings"}, set()),
    ],
    ids=["no-retrieved", "scores-only", "strategies-only", "backbone-only", "no-groups"],
)  # fmt: skip
def test_partial_results(hand: Path, tmp_path: Path, change, present, absent) -> None:  # type: ignore[no-untyped-def]
    change(hand)
    text, page = check_page(Path(write_report(hand, tmp_path / "out")))
    assert present <= set(page.ids) and not absent & set(page.ids)
    if "retrieval" in absent:
        assert "Not in these results: no result for" in text


def test_one_expert(tmp_path: Path) -> None:
    path = synthetic(tmp_path / "one", experts=1, unseen=1, seen=1)
    text, _ = check_page(Path(write_report(path, tmp_path / "out")))
    assert "1 unseen task," in text and "The only single-task expert" in text


def test_hundreds_of_experts(tmp_path: Path) -> None:
    path = synthetic(tmp_path / "many", experts=299, unseen=4, seen=8)
    page = Path(write_report(path, tmp_path / "out"))
    check_page(page)
    assert page.stat().st_size < 3_000_000


def test_output_is_never_taken_from_others(hand: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_report(hand, out, date="2001-01-01")
    write_report(hand, out, date="2002-02-02")  # an older report is replaced
    assert "2002-02-02" in (out / "index.html").read_text()
    (out / "index.html").write_text("<h1>my site</h1>")
    with pytest.raises(FileExistsError, match="is not a report of elm-jax"):
        write_report(hand, out)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        write_report(hand, file)
    with pytest.raises(FileNotFoundError, match="no such folder .did you mean 'hand'"):
        write_report(hand.parent / "hnd", out)


def run_cli(*words: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["report", *words])
    return args.run(args)


def test_cli_prints_tables_and_path(hand: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = hand.parent / "out"
    assert run_cli(str(hand), "--output", str(out)) == 0
    said = capsys.readouterr().out
    assert f"Report: {out / 'index.html'}" in said
    assert re.search(r"^u1 +unseen +40\.0 +20\.0 +50\.0 +60\.0\* +60\.0$", said, re.M)
    assert "The multitask expert beats retrieval on 1 of 2 unseen tasks: u2." in said


def test_cli_json(hand: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = hand.parent / "out"
    assert run_cli(str(hand), "--output", str(out), "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["page"] == str(out / "index.html")
    assert data["tables"]["ranking"]["rows"][0][:2] == [1, "m"]
    assert data["findings"][0].startswith("Retrieval scores 35.0")
