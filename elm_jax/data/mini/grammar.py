"""The grammar of a task of `mini`: what its parts are, and how an example is drawn from them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any
from zlib import crc32

from elm_jax.errors import ElmError, nearest

Words = Mapping[str, tuple[str, ...]]

_SLOT = re.compile(r"\{([a-z_]+)\d*\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")
_PATIENCE = 2000  # draws in vain before a grammar counts as exhausted


@dataclass(frozen=True)
class Prompt:
    """One wording of a task.

    Args:
      name: the template's name, unique within its task.
      text: what the model reads, with slots; `{text}` is the passage.
      labels: the answer words, one for each of the task's outcomes in their order; empty where the
        answer depends on the example.
    """

    name: str
    text: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class MiniTask:
    """A task as a grammar.

    Args:
      name: unique name, `<kind>_<domain>`.
      kind: the ability it asks for, such as `sentiment`.
      unseen: whether it is kept from training.
      templates: its wordings.
      words: slot -> what may fill it, beside the words common to all tasks; must hold `text`.
      outcomes: outcome -> the words that hold only then; outcomes are drawn equally often.
      answer: the target where the prompt has no labels, with slots.
      options: the answer choices where the prompt has no labels, with slots, the answer among
        them; empty for a task that is answered by generating.
      related: the training tasks that ask for the same ability; empty where none does.
    """

    name: str
    kind: str
    unseen: bool
    templates: tuple[Prompt, ...]
    words: Words
    outcomes: Mapping[str, Words] = field(default_factory=lambda: {"": {}})
    answer: str = "{answer}"
    options: tuple[str, ...] = ()
    related: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for outcome, own in self.outcomes.items():
            words = {**COMMON, **self.words, **own}
            used = [t.text for t in self.templates] + list(itertools.chain(*words.values()))
            if not all(t.labels for t in self.templates):
                used += [self.answer, *self.options]
            for slot in _SLOT.findall(" ".join(used)):
                if slot not in words:
                    raise ElmError(
                        f"mini task {self.name!r}, outcome {outcome!r}: no words for {{{slot}}}"
                        + nearest(slot, words)
                    )
        for template in self.templates:
            if "{text}" not in template.text:
                raise ElmError(f"mini prompt {self.name}/{template.name} does not show {{text}}")
            if template.labels and len(template.labels) != len(self.outcomes):
                raise ElmError(
                    f"mini prompt {self.name}/{template.name} has {len(template.labels)} labels "
                    f"for {len(self.outcomes)} outcomes"
                )

    @property
    def prompts(self) -> tuple[str, ...]:
        """The names of its prompts."""
        return tuple(template.name for template in self.templates)


class _Draw:
    """One example in the making: a slot is drawn when first met, and then keeps its value."""

    def __init__(self, rng: Random, words: Words):
        self._rng, self._words = rng, words
        self._values: dict[str, str] = {}

    def fill(self, text: str) -> str:
        return _ARTICLE.sub(r"\1n ", _SLOT.sub(self._value, text))

    def _value(self, slot: re.Match[str]) -> str:
        key, words = slot[0], slot[1]
        if key not in self._values:
            taken = {self._values.get(f"{{{words}{n}}}") for n in ("", 2, 3, 4)}
            free = [word for word in self._words[words] if word not in taken]
            self._values[key] = self.fill(self._rng.choice(free))
        return self._values[key]


def _split_of(text: str) -> str:
    """Returns the split a text belongs to: one in four is for testing."""
    return "test" if crc32(text.encode()) % 4 == 0 else "train"


def stream(task: MiniTask, split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Yields a task's examples; prompts take turns, each goes through all outcomes in blocks."""
    rng = Random(crc32(f"{task.name}/{split}/{seed}".encode()))
    outcomes = tuple(task.outcomes)
    seen: set[str] = set()
    while True:
        orders = [rng.sample(outcomes, len(outcomes)) for _ in task.templates]
        for template, outcome in itertools.chain(
            *(zip(task.templates, turn, strict=True) for turn in zip(*orders, strict=True))
        ):
            draw = _fresh_draw(rng, task, outcome, split, seen)
            inputs = draw.fill(template.text)
            if template.labels:
                target = template.labels[outcomes.index(outcome)]
                choices: list[str] | None = list(template.labels)
            else:
                target = draw.fill(task.answer)
                choices = [draw.fill(option) for option in task.options]
                rng.shuffle(choices)
            yield {
                "inputs": inputs,
                "targets": [target],
                "answer_choices": choices or None,
                "prompt": template.name,
                "id": f"mini/{task.name}/{split}/{seed}/{len(seen) - 1}",
            }


def _fresh_draw(rng: Random, task: MiniTask, outcome: str, split: str, seen: set[str]) -> _Draw:
    """Draws until the text is a new one of this split, and adds it to `seen`."""
    words = {**COMMON, **task.words, **task.outcomes[outcome]}
    for _ in range(_PATIENCE):
        draw = _Draw(rng, words)
        text = draw.fill("{text}")
        if text not in seen and _split_of(text) == split:
            seen.add(text)
            return draw
    raise ElmError(
        f"mini:{task.name}: only {len(seen)} different {split} examples could be made; "
        "ask for a smaller size"
    )


def split_words(text: str) -> tuple[str, ...]:
    """Returns words or phrases that stand with commas between them."""
    return tuple(text.split(", "))


COMMON: Words = {
    "name": split_words(
        "John, Mary, Anne, Tom, George, James, Charles, Emma, Jane, Dick, Fred, Lucy, Harriet, "
        "Henry, William, Edward, Peter, Susan, Alice, Frank, Ben, Adam, David, Agnes"
    ),
    "man": split_words(
        "sailor, soldier, servant, farmer, clerk, visitor, prisoner, doctor, lawyer, "
        "neighbour, stranger, gardener, merchant, teacher, painter, beggar"
    ),
    "animal": split_words("dog, horse, cat, pony, goat, cow, bear, bird"),
    "day": split_words("Monday, Thursday, Friday, Sunday, Christmas Day, that day, the same day"),
    "hour": split_words("five, six, seven, eight, nine, ten, eleven, twelve"),
    "when": split_words(
        "yesterday, this morning, last night, on Monday, on Friday, at noon, after dinner, "
        "before breakfast, last week, a year ago, in the evening, on Sunday"
    ),
    "place": split_words(
        "mill, church, market, barn, forest, river, bridge, castle, inn, school, prison, harbour, "
        "tower, village, meadow, station, theatre, hospital, cottage, chapel"
    ),
    "thing": split_words(
        "ring, book, purse, watch, sword, letter, picture, basket, candle, coat, hat, "
        "silver cup, knife, clock, pipe, lamp, box, gun, key, umbrella"
    ),
    "deed": split_words(
        "saw the fire, danced until midnight, lost money at cards, heard the bell, drank the wine, "
        "spoke in French, wore a black hat, slept in the barn, read the letter, crossed the river, "
        "broke the window, sang a song, hid in the garden, bought a horse, laughed at the king"
    ),
}
