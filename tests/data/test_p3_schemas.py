"""Every prompt on rows in the hub's schema, beside promptsource's semantics written down anew."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
import pytest

from elm_jax.data.p3 import P3Source, catalog
from elm_jax.data.p3.sources import Counts, convert
from elm_jax.data.templates import list_datasets

LONG = "word " * 700
ODD = "Ünïcödé 東京 “q” a|||b {{ x }} {% raw %} &amp;"
PROTECTED = "3ed2dface8203c4c9dfb1a5dc58e41e0"


def labelled(labels: int, **fields: Any) -> list[dict[str, Any]]:
    return [{**fields, "label": label} for label in range(labels)]


def answers(*texts: str) -> dict[str, Any]:
    return {"text": list(texts), "answer_start": [0] * len(texts)}


def lettered(*texts: str) -> dict[str, Any]:
    return {"text": list(texts), "label": list("ABCDEFGH"[: len(texts)])}


# For each dataset (promptsource's folder) rows that reach every branch of its templates.
ROWS: dict[str, list[dict[str, Any]]] = {
    "commonsense_qa": [
        {"question": "Q?", "question_concept": "c", "choices": lettered(*"vwxyz"), "answerKey": "B"}
    ],
    "cos_e/v1.11": [
        {"question": ODD, "choices": list("vwxyz"), "answer": "y",
         "abstractive_explanation": "why", "extractive_explanation": "because"}
    ],
    "cosmos_qa": labelled(
        4, context=LONG, question="Q?", answer0="a", answer1="b", answer2="c", answer3="d"
    ),
    "dream": [{"dialogue": ["M: Hi", "W: Yes"], "question": "Q?", "choice": ["a", "b", "c"],
               "answer": "b"}],
    "qasc": [{"question": "Q?", "choices": lettered(*"stuvwxyz"), "answerKey": "F",
              "fact1": "One.", "fact2": "Two", "combinedfact": "Both.", "formatted_question": "Q"}],
    "quail": [
        {"context": LONG, "question": ODD, "answers": ["a", "b", "c", "d"], "correct_answer_id": i}
        for i in range(4)
    ],
    "quarel": [{"question": ODD, "answer_index": 1,
                "world_literals": {"world1": ["ice"], "world2": ["sand"]}}],
    "quartz": [{"question": question, "choices": lettered("up", "down"), "answerKey": "B",
                "para": "P."} for question in ("It is ____ here?", "It goes")],
    "sciq": [{"question": "Q", "correct_answer": "d", "distractor1": "a", "distractor2": "b",
              "distractor3": "c", "support": support} for support in ("", LONG)],
    "social_i_qa": [{"context": ODD, "question": "Q?", "answerA": "a", "answerB": "b",
                     "answerC": "c", "label": str(i)} for i in (1, 2, 3)],
    "wiki_hop/original": [{"question": "place_of_death dirk", "answer": "amsterdam",
                           "candidates": ["amsterdam", "x"], "supports": [LONG, "second"]}],
    "wiqa": [
        {"question_stem": "suppose it happens", "question_para_step": ["one", "two", "three"],
         "answer_label": label, "answer_label_as_choice": letter, "metadata_question_type": kind,
         "choices": lettered("more", "less", "no effect")}
        for label, letter, kind in (
            ("more", "A", "INPARA_EFFECT"), ("less", "B", "EXOGENOUS_EFFECT"),
            ("no_effect", "C", "OUTOFPARA_DISTRACTOR"),
        )
    ],
    "amazon_polarity": labelled(2, title="", content=ODD),
    "app_reviews": [{"package_name": "app", "review": ODD, "star": star} for star in range(1, 6)],
    "imdb": labelled(2, text=LONG + ODD),
    "rotten_tomatoes": labelled(2, text=ODD),
    "yelp_review_full": labelled(5, text="nice\\nplace"),
    "ag_news": labelled(4, text=LONG),
    "dbpedia_14": labelled(14, title="T", content=ODD),
    "trec": [
        {"text": "Q ?", "coarse_label": coarse, "fine_label": fine}
        for coarse, fine in [(0, 0), (0, 1), (1, 2), (1, 10), (1, 20), (2, 24), (2, 27), (3, 28),
                             (3, 31), (4, 32), (4, 36), (5, 37), (5, 49)]
    ],
    "glue/mrpc": labelled(2, sentence1=ODD, sentence2="b"),
    "glue/qqp": labelled(2, question1="a?", question2="b?"),
    "paws/labeled_final": labelled(2, sentence1="a ,", sentence2=ODD),
    "common_gen": [{"concepts": ["ski", "hill"], "target": "They ski."}],
    "wiki_bio": [
        {"input_text": {"table": {"column_header": ["name", "birth_date", "article_title"],
                                  "content": ["walter", "1954", "walter\n"]},
                        "context": "walter\n"}, "target_text": "walter is .\n"}
    ],
    "cnn_dailymail/3.0.0": [{"article": LONG, "highlights": "A .\nB ."}],
    "gigaword": [{"document": ODD, "summary": "unk"}],
    "multi_news": [{"document": f"One. ||||| {LONG}", "summary": "– Three."}],
    "samsum": [{"dialogue": "A: I\r\nB: <file_gif>", "summary": "s|||t"}],
    "xsum": [{"document": LONG, "summary": ODD}],
    "adversarial_qa/adversarialQA": [
        {"title": "T", "context": LONG, "question": "Q?", "answers": answers("a", "b")}
    ],
    "duorc/ParaphraseRC": [
        {"plot": LONG, "title": "T", "question": "Q?", "answers": given, "no_answer": not given}
        for given in (["a"], [])
    ],
    "quoref": [{"context": ODD, "title": "T", "question": "Q?", "answers": answers("a", "b")}],
    "ropes": [{"background": LONG, "situation": "S", "question": "Q?",
               "answers": {"text": ["a"]}}],
    "hotpot_qa/fullwiki": [
        {"question": "Q?", "answer": "a", "type": "bridge",
         "supporting_facts": {"title": ["A"], "sent_id": [0]},
         "context": {"title": ["A", "B"], "sentences": [["one", "two"], ["three"]]}}
    ],
    "wiki_qa": labelled(2, question="how?", document_title="T", answer=ODD),
    "super_glue/rte": labelled(2, premise=LONG, hypothesis="h"),
    "super_glue/cb": labelled(3, premise=ODD, hypothesis="h"),
    "anli": labelled(3, premise="p", hypothesis="h"),
    "super_glue/copa": [
        row for question in ("cause", "effect")
        for row in labelled(2, premise="It Fell.", choice1="A.", choice2="B.", question=question)
    ],
    "hellaswag": [{"activity_label": "Ski", "ctx_a": "a", "ctx_b": "b", "ctx": "a b",
                   "endings": ["e.", ", f", "g", "h"], "label": str(i)} for i in range(4)],
    "story_cloze/2016": [
        {**{f"input_sentence_{i}": f"S{i}." for i in range(1, 5)}, "sentence_quiz1": "Up.",
         "sentence_quiz2": "Down.", "answer_right_ending": right} for right in (1, 2)
    ],
    "winogrande/winogrande_xl": [
        {"sentence": "Ian saw _ .", "option1": "Ian", "option2": "Al", "answer": answer}
        for answer in "12"
    ],
    "super_glue/wsc.fixed": labelled(
        2, text=ODD, span1_text="Mark", span2_text="He", span1_index=0, span2_index=5
    ),
    "super_glue/wic": labelled(2, word="w", sentence1=ODD, sentence2="b"),
}  # fmt: skip


def promptsource(jinja: str, choices: str | None, row: dict[str, Any]) -> tuple[list[str], Any]:
    """As its `Template.apply`: the cut is written into the text, bars in the data are replaced."""
    environment = jinja2.Environment()
    environment.globals["zip"] = zip
    environment.filters["choice"] = lambda items: items[0]

    def most_frequent(items: list[Any]) -> list[Any]:
        counts = Counter(items).most_common()
        return [item for item, count in counts if count == counts[0][1]]

    environment.filters["most_frequent"] = most_frequent
    guarded = {k: v.replace("|||", PROTECTED) if isinstance(v, str) else v for k, v in row.items()}
    listed = None
    if choices is not None:
        text = environment.from_string(choices).render(guarded)
        listed = [part.strip() for part in text.split("|||")]
    cut = jinja.replace("}}", " | string | truncate(2048) }}")
    text = environment.from_string(cut).render(**guarded, answer_choices=listed)
    parts = [part.replace(PROTECTED, "|||").strip() for part in text.split("|||")]
    return parts, listed and [choice.replace(PROTECTED, "|||") for choice in listed]


def test_all_datasets_have_rows() -> None:
    assert set(ROWS) == {dataset.promptsource for dataset in catalog().datasets.values()}


@pytest.mark.parametrize("folder", ROWS)
def test_every_prompt_renders_as_in_promptsource(shared_data: Path, folder: str) -> None:
    templates = shared_data / "p3" / "templates"
    if folder not in list_datasets(templates):
        pytest.skip(f"no templates of {folder} at hand")
    source = P3Source("raw", str(shared_data), str(templates))
    datasets = [d for d in catalog().datasets.values() if d.promptsource == folder]
    for prompt in datasets[0].prompts:
        template, count = source.template(prompt), Counts()
        for row in ROWS[folder]:
            example = convert(prompt, template, row, "made up", source, count)
            parts, choices = promptsource(template.jinja, template.answer_choices, row)
            if example is None:
                assert len(parts) < 2 or not all(parts)
                continue
            if not re.search(r"\| *choice", template.jinja):  # which draws
                assert [example.inputs, *example.targets] == [part for part in parts if part]
            listed = prompt.answer_choices or (choices and tuple(dict.fromkeys(choices)))
            assert example.answer_choices == listed
        assert count.examples, prompt


@pytest.mark.parametrize(
    "name",
    [
        "imdb/Negation template for positive and negative",
        "wiqa/which_of_the_following_is_the_supposed_perturbation",
    ],
)
def test_choices_of_prompts_whose_template_lacks_a_target(shared_data: Path, name: str) -> None:
    source = P3Source("raw", str(shared_data), str(shared_data / "p3" / "templates"))
    prompt = catalog().find(name)
    found = [
        convert(prompt, source.template(prompt), row, "made up", source, Counts())
        for row in ROWS[prompt.dataset]
    ]
    assert {example.targets[0] for example in found if example} == set(prompt.answer_choices or ())
