"""`mini`, the embedded suite: small prompted English tasks, written by code.

It plays the part that P3 plays in the paper: experts are trained on the training tasks, and one of
them is retrieved for each unseen task. Every task is a small grammar. A *slot* such as `{thing}` is
drawn from the task's words once per example and then keeps its value, `{thing2}` is another draw
from the same words, and a drawn word may itself hold slots. The words are everyday ones of the
English novel, so that a small vocabulary trained on such books keeps most of them whole.

An example belongs to the split its text falls into by checksum, so that no text is ever in both
splits, whatever the sizes and seeds.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

from elm_jax.errors import ElmError, nearest

SIZES = {"train": 400, "test": 100}

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
            words = {**_COMMON, **self.words, **own}
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


def train_tasks() -> tuple[MiniTask, ...]:
    """Returns the tasks that experts are trained on."""
    return tuple(task for task in TASKS if not task.unseen)


def unseen_tasks() -> tuple[MiniTask, ...]:
    """Returns the tasks that no expert is trained on."""
    return tuple(task for task in TASKS if task.unseen)


def examples(
    name: str, split: str, *, size: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Writes the examples of one task.

    Prompts and outcomes come equally often, and a smaller size gives the beginning of a larger one.
    Every example has a text of its own.

    Args:
      name: a task of `TASKS`.
      split: `train` or `test`.
      size: how many; by default 400 to train and 100 to test.
      seed: which examples; no seed ever moves a text to the other split.

    Returns:
      One dictionary per example: `inputs` str, `targets` list of str, `answer_choices` list of str
      (the first target among them) or None, `prompt` str, `id` str (unique).

    Raises:
      ElmError: for an unknown task or split, a negative size, or more examples than there are.

    >>> [example] = examples('topic_season', 'test', size=1)
    >>> example['answer_choices']
    ['spring', 'summer', 'autumn', 'winter']
    >>> example['targets'][0] in example['answer_choices']
    True
    """
    task = _task(name)
    if split not in SIZES:
        raise ElmError(
            f"mini has no split {split!r}, only {' and '.join(SIZES)}{nearest(split, SIZES)}"
        )
    size = SIZES[split] if size is None else size
    if size < 0:
        raise ElmError(f"mini:{name}: size must be 0 or more, got {size}")
    return list(itertools.islice(_stream(task, split, seed), size))


def write(
    directory: str | os.PathLike[str],
    *,
    tasks: str = "all",
    train_size: int = SIZES["train"],
    test_size: int = SIZES["test"],
    seed: int = 0,
) -> list[Path]:
    """Writes tasks as files, `<directory>/<task>/{train,test}.jsonl`, each atomically.

    Args:
      directory: made where it is missing.
      tasks: `all`, `train`, `unseen`, or the name of one task.
      train_size: examples in each train file.
      test_size: examples in each test file.
      seed: as in `examples`.

    Returns:
      The files, in order.

    Raises:
      ElmError: for an unknown task, a negative size, or more examples than there are.
    """
    groups = {"all": TASKS, "train": train_tasks(), "unseen": unseen_tasks()}
    chosen = groups[tasks] if tasks in groups else (_task(tasks, extra=groups),)
    paths = []
    for task, (split, size) in itertools.product(
        chosen, {"train": train_size, "test": test_size}.items()
    ):
        rows = examples(task.name, split, size=size, seed=seed)
        path = Path(directory) / task.name / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(partial, path)
        paths.append(path)
    return paths


def _task(name: str, extra: Mapping[str, object] | None = None) -> MiniTask:
    """Finds a task; `extra` are names that would have been right as well."""
    by_name = {task.name: task for task in TASKS}
    if name not in by_name:
        raise ElmError(
            f"mini has no task {name!r}{nearest(name, [*by_name, *(extra or ())])}; "
            f"its tasks are {', '.join(by_name)}"
        )
    return by_name[name]


def _split_of(text: str) -> str:
    """Returns the split a text belongs to: one in four is for testing."""
    return "test" if crc32(text.encode()) % 4 == 0 else "train"


def _stream(task: MiniTask, split: str, seed: int) -> Iterator[dict[str, Any]]:
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
    words = {**_COMMON, **task.words, **task.outcomes[outcome]}
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


# --- Words -------------------------------------------------------------------------------------


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


_COMMON: Words = {
    "name": _list(
        "John, Mary, Anne, Tom, George, James, Charles, Emma, Jane, Dick, Fred, Lucy, Harriet, "
        "Henry, William, Edward, Peter, Susan, Alice, Frank, Ben, Adam, David, Agnes"
    ),
    "man": _list(
        "sailor, soldier, servant, farmer, clerk, visitor, prisoner, doctor, lawyer, "
        "neighbour, stranger, gardener, merchant, teacher, painter, beggar"
    ),
    "animal": _list("dog, horse, cat, pony, goat, cow, bear, bird"),
    "day": _list("Monday, Thursday, Friday, Sunday, Christmas Day, that day, the same day"),
    "hour": _list("five, six, seven, eight, nine, ten, eleven, twelve"),
    "when": _list(
        "yesterday, this morning, last night, on Monday, on Friday, at noon, after dinner, "
        "before breakfast, last week, a year ago, in the evening, on Sunday"
    ),
    "place": _list(
        "mill, church, market, barn, forest, river, bridge, castle, inn, school, prison, harbour, "
        "tower, village, meadow, station, theatre, hospital, cottage, chapel"
    ),
    "thing": _list(
        "ring, book, purse, watch, sword, letter, picture, basket, candle, coat, hat, "
        "silver cup, knife, clock, pipe, lamp, box, gun, key, umbrella"
    ),
    "deed": _list(
        "saw the fire, danced until midnight, lost money at cards, heard the bell, drank the wine, "
        "spoke in French, wore a black hat, slept in the barn, read the letter, crossed the river, "
        "broke the window, sang a song, hid in the garden, bought a horse, laughed at the king"
    ),
}

# --- Sentiment ---------------------------------------------------------------------------------

_PRAISE = _list(
    "excellent, charming, delightful, pleasant, beautiful, lovely, perfect, admirable, sweet, "
    "splendid, agreeable, wonderful, cheerful, fine, capital, good"
)
_BLAME = _list(
    "dreadful, wretched, miserable, horrible, poor, ugly, dull, disagreeable, terrible, gloomy, "
    "shameful, shocking, unpleasant, vile, painful, bad"
)
_PLEASED = (
    "I was delighted.",
    "It gave us great pleasure.",
    "{name3} praised everything warmly.",
    "We were sorry when it was over.",
    "I never was happier in my life.",
    "We shall remember it with joy.",
)
_ANNOYED = (
    "I was disappointed.",
    "It gave us no pleasure.",
    "{name3} complained bitterly of everything.",
    "We were glad when it was over.",
    "I never was so weary in my life.",
    "We shall remember it with anger.",
)


def _sentiment(
    domain: str,
    *templates: Prompt,
    frames: tuple[str, ...],
    aspects: str,
    praise: str,
    blame: str,
    common: bool = True,
    unseen: bool = False,
    related: tuple[str, ...] = (),
    **words: tuple[str, ...],
) -> MiniTask:
    """Makes a task whose outcomes are good and bad; `common` adds the shared words of opinion."""
    shared = (_PRAISE, _BLAME) if common else ((), ())
    return MiniTask(
        f"sentiment_{domain}",
        "sentiment",
        unseen,
        templates,
        {
            "text": frames,
            "aspect": _list(aspects),
            "very": _list("very, quite, most, really, truly"),
            **words,
        },
        {
            "good": {"op": shared[0] + _list(praise), "verdict": _PLEASED},
            "bad": {"op": shared[1] + _list(blame), "verdict": _ANNOYED},
        },
        related=related,
    )


_GOOD_BAD, _YES_NO = ("good", "bad"), ("yes", "no")

_SENTIMENT = (
    _sentiment(
        "inn",
        Prompt("good_or_bad_inn", "{text}\nIs this inn good or bad?", _GOOD_BAD),
        Prompt(
            "stay_again",
            "A traveller writes: {text}\nWill the traveller stay at this inn again? Yes or no?",
            _YES_NO,
        ),
        aspects="room, bed, supper, parlour, fire, wine, landlord, breakfast, stable, coffee",
        praise="clean, warm, comfortable, fresh",
        blame="dirty, cold, damp, dark",
        frames=(
            "We stopped at an inn near the {place}. The {aspect} was {op} and the {aspect2} was "
            "{very} {op2}.",
            "{name} found the {aspect} of the inn {op}, the {aspect2} {op2} and the {aspect3} "
            "{very} {op3}.",
            "After a long journey we came to an inn. The {aspect} was {very} {op}. {verdict}",
            "At the inn the {aspect} was {op} and the {aspect2} {op2}. {verdict}",
        ),
    ),
    _sentiment(
        "novel",
        Prompt(
            "praise_or_blame",
            "{text}\nDoes the reader praise the book or blame it? Answer praise or blame.",
            ("praise", "blame"),
        ),
        Prompt(
            "good_or_bad_book",
            "What does this reader think of the book, good or bad? {text}",
            _GOOD_BAD,
        ),
        aspects="story, hero, language, style, first chapter, last chapter, author, conversation",
        praise="clever, lively, interesting, brilliant",
        blame="silly, dry, stupid, ridiculous",
        frames=(
            "I finished the new novel on {day}. The {aspect} is {very} {op} and the {aspect2} is "
            "{op2}.",
            "{name} lent me a book in three volumes. The {aspect} was {op}, the {aspect2} {op2} "
            "and the {aspect3} {very} {op3}.",
            "In this book the {aspect} is {op}, and {name} calls the {aspect2} {op2}. {verdict}",
            "I read the tale to {name} {when}. The {aspect} is {very} {op}. {verdict}",
        ),
    ),
    _sentiment(
        "servant",
        Prompt(
            "well_or_ill",
            "A lady writes about her servant: {text}\nDoes she speak well or ill of the {aspect}?",
            ("well", "ill"),
        ),
        Prompt(
            "take_the_servant",
            "{text}\nShould I take the {aspect} into my house? Yes or no?",
            _YES_NO,
        ),
        aspects="coachman, footman, gardener, cook, clerk, groom, butler, porter",
        praise="faithful, honest, careful, clean, quick, modest, polite, gentle, kind, steady, "
        "sensible, patient, civil, good, excellent, agreeable",
        blame="idle, false, careless, dirty, slow, proud, rude, cruel, foolish, lazy, vain, "
        "impatient, stupid, bad, dreadful, disagreeable",
        common=False,
        frames=(
            "The {aspect} has lived with us for {hour} years, and is {very} {op} and {op2}.",
            "{name} tells me that the {aspect} was always {op}, {op2} and {very} {op3} with the "
            "children.",
            "You ask me about the {aspect}. Everybody in the house thinks him {op} and {op2}.",
            "Last year {name} had the same {aspect}, and found him {very} {op} and {op2}.",
        ),
    ),
    _sentiment(
        "holiday",
        Prompt(
            "happy_or_sad_day",
            "{text}\nWas it a happy day or a sad one? Answer happy or sad.",
            ("happy", "sad"),
        ),
        Prompt(
            "enjoyed_the_day",
            "From a diary: {text} Did the party enjoy the holiday? Yes or no?",
            _YES_NO,
        ),
        aspects="weather, road, sky, music, company, dance, walk, boat, dinner, garden",
        praise="fresh, merry, bright, glorious",
        blame="wet, cold, weary, dark",
        frames=(
            "We spent {day} {out}. The {aspect} was {op} and the {aspect2} {very} {op2}.",
            "{name} took us all for a holiday {out}. The {aspect} was {op}. {verdict}",
            "On {day} I went with {name} and {name2} {out}. The {aspect} was {very} {op}, the "
            "{aspect2} {op2}.",
            "Our holiday {out} is over. The {aspect} was {op} and the {aspect2} {op2}. {verdict}",
        ),
        out=_list(
            "by the river, to the hills, to the fair, on the lake, in the woods, by the sea, "
            "to the races, in the country"
        ),
    ),
    _sentiment(
        "play",
        Prompt(
            "pleased_or_angry",
            "{text}\nWas the writer pleased or angry after the play?",
            ("pleased", "angry"),
        ),
        Prompt("good_or_bad_play", "{text} Would you call the play good or bad?", _GOOD_BAD),
        aspects="singer, music, actor, first act, last act, dancing, speech, voice, song, hero",
        praise="graceful, brilliant, grand, clever",
        blame="wooden, silly, stupid, awkward",
        unseen=True,
        related=("sentiment_novel", "sentiment_inn", "sentiment_holiday"),
        frames=(
            "Last night at the theatre the {aspect} was {op} and the {aspect2} {very} {op2}.",
            "{name} and I saw the new play. The {aspect} was {very} {op}. {verdict}",
            "At the theatre on {day} {name} thought the {aspect} {op}, the {aspect2} {op2} and "
            "the {aspect3} {op3}.",
        ),
    ),
    _sentiment(
        "dinner",
        Prompt(
            "liked_the_dinner",
            "A guest says: {text} Did the guest like the dinner? Yes or no?",
            _YES_NO,
        ),
        Prompt(
            "happy_or_sad_guest", "{text}\nDid the guest go home happy or sad?", ("happy", "sad")
        ),
        aspects="soup, fish, mutton, beef, pudding, bread, wine, sauce, cheese, meat, cake, tea",
        praise="tender, fresh, hot, rich",
        blame="burnt, cold, hard, sour",
        unseen=True,
        related=("sentiment_inn", "sentiment_holiday"),
        frames=(
            "We dined with {name} on {day}. The {aspect} was {op} and the {aspect2} {very} {op2}.",
            "At table the {aspect} was {very} {op}, the {aspect2} {op2} and the {aspect3} {op3}.",
            "{name} gave a dinner {when}. The {aspect} was {op}. {verdict}",
        ),
    ),
)

# --- Topic -------------------------------------------------------------------------------------


def _topic(
    domain: str,
    *templates: Prompt,
    frames: tuple[str, ...],
    nouns: Mapping[str, str],
    unseen: bool = False,
    related: tuple[str, ...] = (),
) -> MiniTask:
    """Makes a task whose outcome shows in the nouns alone."""
    return MiniTask(
        f"topic_{domain}",
        "topic",
        unseen,
        templates,
        {"text": frames},
        {topic: {"noun": _list(words)} for topic, words in nouns.items()},
        related=related,
    )


_CALLINGS = {
    "sea": "ship, sail, mast, deck, boat, anchor, tide, whale, voyage, crew, shore, harbour, "
    "wreck, net, storm, island",
    "farm": "barn, plough, cow, hay, harvest, sheep, corn, pig, wheat, milk, orchard, cart, "
    "field, fence, seed, butter",
    "war": "battle, army, sword, gun, regiment, enemy, general, march, cannon, victory, drum, "
    "camp, wound, flag, attack, retreat",
    "church": "altar, sermon, prayer, hymn, bible, parson, choir, steeple, psalm, bishop, "
    "chapel, saint, blessing, cross, gospel, soul",
}
_SEASONS = {
    "spring": "lambs, cuckoo, violets, blossom, young leaves, first flowers, nests, daisies, "
    "seeds, showers, April rain, March wind",
    "summer": "heat, roses, bees, hay, strawberries, thunder, sunshine, butterflies, cool shade, "
    "long days, July sun, June evening",
    "autumn": "harvest, apples, falling leaves, ripe corn, nuts, plums, pears, October mist, "
    "hunters, brown leaves, grapes, September wind",
    "winter": "snow, ice, frost, Christmas, sledge, bare trees, frozen pond, long nights, "
    "bitter cold, fur coat, January wind, December fog",
}

_TOPIC = (
    _topic(
        "passage",
        Prompt(
            "subject",
            "{text}\nWhat is this passage about: sea, farm, war or church?",
            ("sea", "farm", "war", "church"),
        ),
        Prompt(
            "who_would_say_so",
            "Who would tell such a story, a sailor, a farmer, a soldier or a priest? {text}",
            ("sailor", "farmer", "soldier", "priest"),
        ),
        nouns=_CALLINGS,
        frames=(
            "All the morning they talked of the {noun} and the {noun2}, and in the evening of the "
            "{noun3}.",
            "{name} dreamed of the {noun}, the {noun2} and the {noun3} until the clock struck "
            "{hour}.",
            "First came the {noun}, then the {noun2}, and soon nobody thought of anything but the "
            "{noun3}.",
            "{name} could remember the {noun} and the {noun2} very well, but not the {noun3}.",
        ),
    ),
    _topic(
        "shop",
        Prompt(
            "whose_shop",
            "{text}\nIn whose shop was this: baker, tailor, doctor or smith?",
            ("baker", "tailor", "doctor", "smith"),
        ),
        Prompt(
            "what_is_sold",
            "{text} What does the shop sell? Choose bread, clothes, medicine or iron.",
            ("bread", "clothes", "medicine", "iron"),
        ),
        nouns={
            "baker": "cake, flour, loaf, oven, crust, pie, roll, biscuit, pudding, sugar, tart, "
            "butter",
            "tailor": "coat, cloth, button, sleeve, waistcoat, needle, thread, silk, collar, "
            "pocket, trousers, velvet",
            "doctor": "fever, pulse, cough, bottle, powder, pill, bandage, pain, illness, wound, "
            "headache, patient",
            "smith": "hammer, nail, forge, chain, lock, horseshoe, hinge, anvil, spade, wheel, "
            "bolt, poker",
        },
        frames=(
            "{name} came into the shop on {day} to ask about the {noun}, and stayed to speak of "
            "the {noun2} and the {noun3}.",
            "Pray look to the {noun} and the {noun2} of {name} before {day}, and let the {noun3} "
            "wait.",
            "The bill of {name} was for the {noun}, the {noun2} and the {noun3}, and was paid on "
            "{day}.",
            "In the shop there was no talk but of the {noun} and the {noun2}, until {name} spoke "
            "of the {noun3}.",
        ),
    ),
    _topic(
        "season",
        Prompt(
            "time_of_year",
            "{text}\nWhat time of the year is it: spring, summer, autumn or winter?",
            tuple(_SEASONS),
        ),
        Prompt(
            "name_the_season",
            "Name the season of this scene, spring, summer, autumn or winter. {text}",
            tuple(_SEASONS),
        ),
        nouns=_SEASONS,
        frames=(
            "From the window {name} could see the {noun} and the {noun2}, and thought of the "
            "{noun3}.",
            "{name} and {name2} walked to the {place} and spoke of the {noun}, the {noun2} and the "
            "{noun3}.",
            "The poem tells of the {noun} and the {noun2}, and at last of the {noun3} near the "
            "{place}.",
            "Nothing pleased {name} more than the {noun}, unless it were the {noun2} or the "
            "{noun3}.",
        ),
    ),
    _topic(
        "room",
        Prompt(
            "which_part_of_the_house",
            "{text}\nWhere are they: kitchen, garden, library or stable?",
            ("kitchen", "garden", "library", "stable"),
        ),
        Prompt(
            "where_to_look",
            "Where should I look for {name}, in the kitchen, the garden, the library or the "
            "stable? {text}",
            ("kitchen", "garden", "library", "stable"),
        ),
        nouns={
            "kitchen": "pot, kettle, oven, cook, plates, saucepan, flour, dish, spoon, salt, "
            "onions, soup",
            "garden": "roses, path, lawn, hedge, bees, tree, flowers, fountain, grass, gravel, "
            "lilies, birds",
            "library": "books, desk, pen, ink, shelf, letters, map, newspaper, paper, volumes, "
            "writing table, dictionary",
            "stable": "horse, saddle, hay, bridle, groom, mare, harness, straw, pony, oats, "
            "reins, whip",
        },
        frames=(
            "{name} was busy with the {noun} and the {noun2} when {name2} called from behind the "
            "{noun3}.",
            "We found {name} near the {noun}, looking at the {noun2} and then at the {noun3}.",
            "{name} left the {noun} and the {noun2} to {name2}, and turned to the {noun3}.",
            "Between the {noun} and the {noun2} stood {name}, and talked about the {noun3}.",
        ),
    ),
    _topic(
        "letter",
        Prompt(
            "who_wrote_it",
            "Part of a letter: {text}\nWho wrote it, a sailor, a farmer, a soldier or a priest?",
            ("sailor", "farmer", "soldier", "priest"),
        ),
        Prompt(
            "where_it_comes_from",
            "{text}\nDoes this letter come from a ship, a farm, an army or a church?",
            ("ship", "farm", "army", "church"),
        ),
        nouns={
            "sea": "sail, mast, deck, anchor, tide, whale, voyage, crew, shore, captain, waves",
            "farm": "barn, plough, cow, harvest, sheep, corn, wheat, milk, hens, horses, cheese",
            "war": "battle, sword, gun, regiment, enemy, cannon, victory, drum, bullet, fort",
            "church": "altar, sermon, prayer, hymn, bible, bishop, chapel, saint, heaven, faith, "
            "funeral",
        },
        unseen=True,
        related=("topic_passage",),
        frames=(
            "My dear {name}, I think of you whenever I see the {noun} or the {noun2}. Tomorrow I "
            "must look to the {noun3}.",
            "I have no time to write, {name}, for the {noun} and the {noun2} keep me busy until "
            "{hour}.",
            "You ask for news, {name}. It is all of the {noun}, the {noun2} and the {noun3} here.",
        ),
    ),
    _topic(
        "weather",
        Prompt(
            "summer_or_winter", "{text}\nWas this in summer or in winter?", ("summer", "winter")
        ),
        Prompt("warm_or_cold", "Is the day warm or cold? {text}", ("warm", "cold")),
        nouns={
            "warm": "heat, roses, bees, hay, thunder, sunshine, butterflies, cool shade, green "
            "leaves, dusty road, open windows, July sun",
            "cold": "snow, ice, frost, Christmas, sledge, bare trees, frozen pond, fur coat, "
            "icy road, great fire, thick gloves, December fog",
        },
        unseen=True,
        related=("topic_season",),
        frames=(
            "{name} said that the {noun} and the {noun2} were the talk of the village, with the "
            "{noun3}.",
            "On the way to the {place} {name} spoke of the {noun}, and {name2} of the {noun2}.",
            "I shall never forget the {noun}, the {noun2} and the {noun3} on that day, dear "
            "{name}.",
        ),
    ),
)

# --- Inference ---------------------------------------------------------------------------------

_YES_NO_PERHAPS = ("yes", "no", "perhaps")

_SAME = (
    ("ran to the house", "hurried to the house"),
    ("began to cry", "burst into tears"),
    ("went to bed", "lay down to sleep"),
    ("said nothing", "remained silent"),
    ("became angry", "flew into a passion"),
    ("was very poor", "had no money"),
    ("caught a fever", "fell very ill"),
    ("left the town", "went away from the town"),
    ("wrote a letter", "took a pen and wrote"),
    ("shut the door", "closed the door"),
    ("told a lie", "said what was false"),
    ("liked the music", "was fond of the music"),
)

_INFERENCE = (
    MiniTask(
        "inference_number",
        "inference",
        False,
        (
            Prompt(
                "did_it_too",
                "{text} Is it true that {name} {deed}? Yes, no or perhaps?",
                _YES_NO_PERHAPS,
            ),
            Prompt(
                "must_it_be_so",
                'Read this: {text}\nDoes it follow that "{name} {deed}"? Yes, no or perhaps?',
                _YES_NO_PERHAPS,
            ),
        ),
        {
            "where": _list(
                "in the town, at the inn, in the village, in the house, at the fair, in the "
                "castle, of the company, from the north"
            ),
            "text": (
                "{name} was a {man} {where}. {some} {where} {deed}.",
                "{some} {where} {deed} {when}. Now {name} was a {man} {where}.",
            ),
        },
        {
            "yes": {"some": ("Every {man}", "Each {man}", "All the {man}s", "Every single {man}")},
            "no": {"some": ("No {man}", "Not one {man}", "None of the {man}s", "Never a {man}")},
            "perhaps": {
                "some": (
                    "Some of the {man}s",
                    "A few of the {man}s",
                    "Only half of the {man}s",
                    "Perhaps one {man}",
                )
            },
        },
    ),
    MiniTask(
        "inference_witness",
        "inference",
        False,
        (
            Prompt(
                "did_it_happen",
                "{text}\nDo we know that the {man} {deed}? Yes, no or perhaps?",
                _YES_NO_PERHAPS,
            ),
            Prompt(
                "true_false_unknown",
                "{text} The {man} {deed}: is that true, false or unknown?",
                ("true", "false", "unknown"),
            ),
        ),
        {
            "text": (
                "{name} wrote to me {when}: {cue} the {man} {deed}.",
                "You ask about the {man}, {name}. I must answer that {cue} the {man} {deed}.",
                "Dear {name}, {cue} the {man} {deed} {when}.",
            )
        },
        {
            "yes": {
                "cue": _list(
                    "it is certain that, I saw with my own eyes that, everybody knows that, "
                    "I remember well that, nobody doubts that, it was proved that"
                )
            },
            "no": {
                "cue": _list(
                    "it is false that, it is a lie that, it is not true that, "
                    "it is impossible that, it was a mere dream that, it is quite wrong to say that"
                )
            },
            "perhaps": {
                "cue": _list(
                    "people say that, I hope that, I suppose that, it is possible that, "
                    "perhaps it is so that, I wonder whether"
                )
            },
        },
    ),
    MiniTask(
        "inference_same",
        "inference",
        False,
        (
            Prompt(
                "same_meaning", "{text}\nDo the two sentences mean the same? Yes or no?", _YES_NO
            ),
            Prompt(
                "same_or_different",
                "Compare two sentences. {text} Is their meaning the same or different?",
                ("same", "different"),
            ),
        ),
        {"text": ("First: {name} {pair} {when}.",)},
        {
            "yes": {
                "pair": tuple(
                    f"{first} {{when}}. Second: {{name}} {second}"
                    for pair in _SAME
                    for first, second in (pair, pair[::-1])
                )
            },
            "no": {
                "pair": tuple(
                    f"{first} {{when}}. Second: {{name}} {second}"
                    for one, other in itertools.permutations(_SAME, 2)
                    for first, second in itertools.product(one, other)
                )
            },
        },
    ),
    MiniTask(
        "inference_rumour",
        "inference",
        True,
        (
            Prompt(
                "is_it_so",
                "News has come to the village. {text} Is it so? Yes, no or perhaps?",
                _YES_NO_PERHAPS,
            ),
            Prompt(
                "believe_it",
                "{text}\nCan we believe that the {man} {deed}? Answer yes, no or perhaps.",
                _YES_NO_PERHAPS,
            ),
        ),
        {
            "text": (
                "{name} said at the {place} that {cue} the {man} {deed}.",
                "At the {place} on {day} they told us that {cue} the {man} {deed}.",
            )
        },
        {
            "yes": {
                "cue": _list(
                    "it is certain that, everybody knows that, nobody doubts that, "
                    "it is well known that, there is no doubt that, it is true that"
                )
            },
            "no": {
                "cue": _list(
                    "it is false that, it is a lie that, it is not true that, "
                    "it is quite untrue that, it is not the case that, it is impossible that"
                )
            },
            "perhaps": {
                "cue": _list(
                    "it is possible that, people say that, some suppose that, "
                    "it may be that, there is some hope that, perhaps it is so that"
                )
            },
        },
        related=("inference_witness", "inference_number"),
    ),
)

# --- Choice ------------------------------------------------------------------------------------

_TOOLS = {
    "knife": _list("cut the bread, cut up the meat, peel an apple"),
    "needle": _list("mend the stocking, sew on a button, sew the torn dress"),
    "candle": _list("read in the dark, light the dark stairs, see in the cellar"),
    "key": _list("open the locked door, open the iron chest, lock up the house"),
    "pen": _list("write a letter, sign the paper, write down the name"),
    "spade": _list("dig in the garden, bury the bones, dig a deep hole"),
    "boat": _list("cross the river, row over the lake, get to the island"),
    "horse": _list("ride to the town, draw the carriage, gallop over the fields"),
    "kettle": _list("boil the water, make the tea, make the coffee"),
    "clock": _list("know the hour, tell the time, find out how late it was"),
    "rope": _list("tie up the prisoner, fasten the boat, climb down the wall"),
    "broom": _list("sweep the floor, sweep the steps, clear away the dust"),
    "hammer": _list("drive in a nail, break the stone, strike the iron"),
    "gun": _list("shoot the birds, fire at the enemy, hunt the deer"),
    "cup": _list("drink some water, pour out the milk, drink a little wine"),
    "basket": _list("carry the eggs, bring home the apples, gather the mushrooms"),
    "bell": _list("call the servants, wake the whole house, ring for tea"),
    "axe": _list("cut down the tree, chop the wood, split the logs"),
    "map": _list("find the way, learn the roads, see where the country lies"),
    "net": _list("catch the fish, take the birds alive, catch the butterfly"),
}
_KINDS = {
    "an animal": _list("horse, dog, cat, cow, sheep, lion, mouse, bear, fox, pig, wolf, goat"),
    "something to eat": _list(
        "cake, pie, loaf, pudding, pear, plum, cherry, nut, biscuit, potato, tart, cheese"
    ),
    "something to wear": _list(
        "coat, hat, bonnet, glove, shoe, shawl, cap, gown, cloak, boot, shirt, stocking"
    ),
    "a piece of furniture": _list(
        "table, chair, bed, sofa, desk, shelf, bench, stool, cupboard, carpet, couch, curtain"
    ),
    "a weapon": _list("sword, gun, spear, dagger, pistol, cannon, rifle, musket, arrow, lance"),
}
_USES = {
    "eat": _list("cake, pie, loaf, pudding, pear, plum, fish, egg, turnip, sausage, carrot, bun"),
    "wear": _list("coat, hat, bonnet, glove, shoe, shawl, jacket, veil, apron, collar, wig, ring"),
}
_ORDERS = tuple(itertools.permutations(("{answer}", "{other}", "{other2}")))

_CHOICE = (
    MiniTask(
        "choice_tool",
        "choice",
        False,
        (
            Prompt("what_was_needed", "{text}\nWhat did {name} need: {answers}?"),
            Prompt("bring_it", "Bring {name} the right thing, {answers}. {text}"),
        ),
        {
            "wished": _list("wished, wanted, had, tried, was asked"),
            "text": (
                "{name} {wished} to {need} {when}, but had nothing to do it with.",
                'Near the {place} {name} {wished} to {need}. "What shall I do?" said {name}.',
                "{name2} told me {when} that {name} {wished} to {need}.",
            ),
            "answers": tuple("a {}, a {} or a {}".format(*order) for order in _ORDERS),
        },
        {
            tool: {
                "need": needs,
                "answer": (tool,),
                "other": tuple(other for other in _TOOLS if other != tool),
            }
            for tool, needs in _TOOLS.items()
        },
        options=("{answer}", "{other}", "{other2}"),
    ),
    MiniTask(
        "choice_kind",
        "choice",
        False,
        (
            Prompt("which_is", "{text}\nWhich one of the three is {kind}?"),
            Prompt("name_the_one", "Name the one that is {kind}. {text}"),
        ),
        {
            "text": tuple(
                frame.format(*order)
                for order in _ORDERS
                for frame in (
                    "In the picture which {{name}} painted there is a {}, a {} and a {}.",
                    "{{name}} dreamed {{when}} of a {}, a {} and a {}.",
                    "The story which {{name}} told us {{when}} was about a {}, a {} and a {}.",
                )
            )
        },
        {
            kind: {
                "kind": (kind,),
                "answer": members,
                "other": tuple(
                    itertools.chain(*(words for other, words in _KINDS.items() if other != kind))
                ),
            }
            for kind, members in _KINDS.items()
        },
        options=("{answer}", "{other}", "{other2}"),
    ),
    MiniTask(
        "choice_sequel",
        "choice",
        False,
        (
            Prompt("what_next", "{text}\nWhat did {name} do then?"),
            Prompt(
                "finish_the_story",
                "Finish the story with the better ending: {glad}, or {sorry}? {text} Then {name}",
            ),
        ),
        {
            "glad": _list(
                "laughed and sang, danced for joy, smiled all day, thanked heaven, felt very "
                "happy, shouted with delight, kissed everybody"
            ),
            "sorry": _list(
                "wept bitterly, sat down and cried, sighed all day, grew pale with grief, felt "
                "very unhappy, groaned with pain, would not speak"
            ),
            "text": (
                "{name} {event} {when}, and {name2} was there.",
                "{name2} came running to the {place} and told us that {name} {event}.",
                "One day near the {place} {name} {event}.",
            ),
        },
        {
            "glad": {
                "answer": ("{glad}",),
                "event": _list(
                    "came into a fortune, found the lost purse, won the race, was praised by the "
                    "king, met an old friend again, got a letter from home, was made a captain, "
                    "was set free, received a fine present, won the prize, got well at last, "
                    "heard the good news"
                ),
            },
            "sorry": {
                "answer": ("{sorry}",),
                "event": _list(
                    "lost all the money, fell from the horse, was sent to prison, was bitten by "
                    "the dog, broke the best glass, missed the coach, caught a bad fever, was "
                    "robbed on the road, lost an old friend, was beaten by the master, was hurt "
                    "by a stone, heard the bad news"
                ),
            },
        },
        options=("{glad}", "{sorry}"),
    ),
    MiniTask(
        "choice_owner",
        "choice",
        False,
        (
            Prompt("who_has_it", "{text}\nWho has the {thing} now, {name} or {name2}?"),
            Prompt("where_is_it", "{text} Is the {thing} with {name} or with {name2}?"),
        ),
        {
            "text": (
                "One day near the {place} {name} {deal}.",
                "{name} {deal} {when}, and went home.",
                "It is said that {name} {deal} {when}.",
            )
        },
        {
            "first": {
                "answer": ("{name}",),
                "deal": tuple(
                    f"{verb} a {{thing}} from {{name2}}"
                    for verb in _list("took, bought, borrowed, stole, received, got")
                ),
            },
            "second": {
                "answer": ("{name2}",),
                "deal": tuple(
                    f"{verb} a {{thing}} to {{name2}}"
                    for verb in _list("gave, lent, sold, sent, handed, brought")
                ),
            },
        },
        options=("{name}", "{name2}"),
    ),
    MiniTask(
        "choice_use",
        "choice",
        True,
        (
            Prompt("what_can_be_used", "{text}\nWhich of these things could {name} {use}?"),
            Prompt("pick_one", "{name} wants something to {use}. {text} What does {name} take?"),
        ),
        {
            "text": tuple(
                frame.format(*order)
                for order in _ORDERS
                for frame in (
                    "On the table before {{name}} lay a {}, a {} and a {}.",
                    "{{name2}} sent {{name}} a box with a {}, a {} and a {} in it.",
                )
            )
        },
        {
            use: {
                "use": (use,),
                "answer": members,
                "other": (*_USES[other], *_list("sword, gun, pistol, toy, brick, stone, bell")),
            }
            for (use, members), other in zip(_USES.items(), reversed(_USES), strict=True)
        },
        options=("{answer}", "{other}", "{other2}"),
        related=("choice_kind",),
    ),
    MiniTask(
        "choice_heir",
        "choice",
        True,
        (
            Prompt("owner_in_the_end", "{text}\nWho has the {thing} in the end?"),
            Prompt(
                "to_whom_it_belongs",
                "{text} Is the {thing} now with the {heir} or with the {heir2}?",
            ),
        ),
        {
            "heir": _list(
                "captain, widow, uncle, cousin, nephew, lady, aunt, count, prince, princess, "
                "brother, sister"
            ),
            "text": (
                "Near the {place} a {heir} {deal}.",
                "{name} tells us that many years ago a {heir} {deal}.",
            ),
        },
        {
            "first": {
                "answer": ("{heir}",),
                "deal": tuple(
                    f"{verb} a {{thing}} from a {{heir2}}"
                    for verb in _list("won, bought, took, received, got, seized")
                ),
            },
            "second": {
                "answer": ("{heir2}",),
                "deal": tuple(
                    f"{verb} a {{thing}} to a {{heir2}}"
                    for verb in _list("left, gave, sold, sent, returned, offered")
                ),
            },
        },
        options=("{heir}", "{heir2}"),
        related=("choice_owner",),
    ),
)

# --- Extraction --------------------------------------------------------------------------------

_EXTRACTION = (
    MiniTask(
        "extraction_place",
        "extraction",
        False,
        (
            Prompt("where_did_it_go", "{text}\nWhere did {name} go?"),
            Prompt("find_the_place", "Find the place in this sentence. {text}"),
        ),
        {
            "text": (
                "{name} walked to the {place} {when} with {name2} and an old {animal}.",
                "Early on {day} {name} left the house and hurried to the {place} to meet {name2}.",
                "{name} rode to the {place} {when}, though {name2} would rather have stayed at "
                "home.",
                "At {hour} {name} came to the {place} with a {thing} for {name2}.",
            )
        },
        answer="{place}",
    ),
    MiniTask(
        "extraction_colour",
        "extraction",
        False,
        (
            Prompt("what_colour", "{text}\nWhat colour was the {garment}?"),
            Prompt("name_the_colour", "Tell me the colour of the {garment}. {text}"),
        ),
        {
            "colour": _list(
                "black, white, red, blue, green, brown, grey, yellow, purple, pink, golden, scarlet"
            ),
            "garment": _list("coat, hat, bonnet, shawl, cap, gown, cloak, dress, ribbon, glove"),
            "text": (
                "{name} came down {when} in a {colour} {garment}, and {name2} laughed.",
                "Near the {place} {name2} found the {colour} {garment} which {name} had lost.",
                "On {day} {name} went to church with {name2} and wore a {colour} {garment}.",
                "A {colour} {garment} lay beside the {thing}, and {name} asked whose it was.",
            ),
        },
        answer="{colour}",
    ),
    MiniTask(
        "extraction_name",
        "extraction",
        False,
        (
            Prompt("what_name", "{text}\nWhat was the name of the {man}?"),
            Prompt("who_was_it", "Who was the {man}? Give the name. {text}"),
        ),
        {
            "text": (
                "The {man} who {deed} was called {name}, and lived near the {place}.",
                "{name} the {man} came back on {day} after a year beyond the {place}.",
                "In our village there was a {man}, {name} by name, who {deed} {when}.",
                "They say that {name}, a {man} who lived by the {place}, once {deed}.",
            )
        },
        answer="{name}",
    ),
    MiniTask(
        "extraction_found",
        "extraction",
        True,
        (
            Prompt("where_was_it", "{text}\nWhere was the {thing}?"),
            Prompt(
                "tell_the_place", "Something was lost and found again. {text} Tell me the place."
            ),
        ),
        {
            "place": _list(
                "mill, church, market, barn, forest, river, castle, school, tower, meadow, "
                "cottage, cellar, well, kitchen, shop, stable"
            ),
            "text": (
                "The {thing} which {name} lost was found {when} near the {place} by a {man}.",
                "A {man} went to the {place} on {day} and saw the {thing} of {name} there.",
                "{name} looked for the {thing} all day, and at last a {animal} found it near the "
                "{place}.",
            ),
        },
        answer="{place}",
        related=("extraction_place",),
    ),
)

# --- Rewriting ---------------------------------------------------------------------------------

_REWRITING = (
    MiniTask(
        "rewriting_title",
        "rewriting",
        False,
        (
            Prompt("give_a_title", "{text}\nGive this story a title."),
            Prompt("title_of_the_tale", "Write the title of the tale. {text}"),
        ),
        {
            "adjective": _list(
                "old, poor, rich, young, brave, happy, wicked, clever, foolish, faithful, blind, "
                "honest, lazy, proud, little, strange"
            ),
            "text": (
                "There was once a {adjective} {man} who {deed} {when} and never came home again.",
                "Many years ago a {adjective} {man} lived near the {place} and {deed}.",
                "{name} met a {adjective} {man} near the {place}, and they {deed}.",
            ),
        },
        answer="the {adjective} {man}",
    ),
    MiniTask(
        "rewriting_words",
        "rewriting",
        False,
        (
            Prompt("make_a_sentence", "Make one sentence out of these words: {text}"),
            Prompt("join_the_words", "{text}\nJoin the words and write them down as one sentence."),
        ),
        {
            "went": _list("walked, ran, rode, went, hurried, came, travelled, marched"),
            "text": ("{name}, {went}, {place}, {animal}, {when}.",),
        },
        answer="{name} {went} to the {place} with the {animal} {when}.",
    ),
    MiniTask(
        "rewriting_heading",
        "rewriting",
        True,
        (
            Prompt("head_the_chapter", "{text}\nWrite a short heading for this chapter."),
            Prompt("what_to_call_it", "What shall we call this chapter? {text}"),
        ),
        {
            "adjective": _list(
                "old, poor, brave, happy, wicked, clever, foolish, faithful, hungry, wild, "
                "gentle, lame"
            ),
            "text": (
                "In this chapter {name} meets a {adjective} {who} near the {place}, and they "
                "become friends.",
                "Here we read how a {adjective} {who} came to the {place} {when} and {deed}.",
            ),
            "who": (*_COMMON["animal"], *_COMMON["man"]),
        },
        answer="the {adjective} {who}",
        related=("rewriting_title",),
    ),
)

# --- Reckoning: nothing in training teaches it -------------------------------------------------

_NUMBERS = _list("one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve")

_RECKONING = (
    MiniTask(
        "reckoning_coins",
        "reckoning",
        True,
        (
            Prompt("how_many_in_all", "{text}\nHow many {coin} are there in all?"),
            Prompt("count_them", "Count the {coin} together and tell the number. {text}"),
        ),
        {
            "coin": _list("shillings, pounds, pennies, guineas"),
            "text": (
                "{name} had {sum}, and no more.",
                "On {day} there were {sum} in the house of {name}.",
            ),
            "spot": _list("in a box, in a purse, in a drawer, on the table, under the bed"),
        },
        {
            total: {
                "answer": (total,),
                "other": tuple(number for number in _NUMBERS[3:] if number != total),
                "sum": tuple(
                    f"{_NUMBERS[first]} {{coin}} {{spot}} and {_NUMBERS[n - first - 1]} {{spot2}}"
                    for first in range(1, n - 1)
                ),
            }
            for n, total in enumerate(_NUMBERS)
            if n > 3
        },
        options=("{answer}", "{other}", "{other2}"),
    ),
)

TASKS: tuple[MiniTask, ...] = tuple(
    sorted(
        (*_SENTIMENT, *_TOPIC, *_INFERENCE, *_CHOICE, *_EXTRACTION, *_REWRITING, *_RECKONING),
        key=lambda task: (task.unseen, task.name),
    )
)
