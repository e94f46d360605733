"""The tasks of `mini` that are answered by a label: sentiment, topic and inference."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from elm_jax.data.mini.grammar import MiniTask, Prompt, split_words

# --- Sentiment ---------------------------------------------------------------------------------

_PRAISE = split_words(
    "excellent, charming, delightful, pleasant, beautiful, lovely, perfect, admirable, sweet, "
    "splendid, agreeable, wonderful, cheerful, fine, capital, good"
)
_BLAME = split_words(
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
            "aspect": split_words(aspects),
            "very": split_words("very, quite, most, really, truly"),
            **words,
        },
        {
            "good": {"op": shared[0] + split_words(praise), "verdict": _PLEASED},
            "bad": {"op": shared[1] + split_words(blame), "verdict": _ANNOYED},
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
        out=split_words(
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
        {topic: {"noun": split_words(words)} for topic, words in nouns.items()},
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
            "where": split_words(
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
                "cue": split_words(
                    "it is certain that, I saw with my own eyes that, everybody knows that, "
                    "I remember well that, nobody doubts that, it was proved that"
                )
            },
            "no": {
                "cue": split_words(
                    "it is false that, it is a lie that, it is not true that, "
                    "it is impossible that, it was a mere dream that, it is quite wrong to say that"
                )
            },
            "perhaps": {
                "cue": split_words(
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
                "cue": split_words(
                    "it is certain that, everybody knows that, nobody doubts that, "
                    "it is well known that, there is no doubt that, it is true that"
                )
            },
            "no": {
                "cue": split_words(
                    "it is false that, it is a lie that, it is not true that, "
                    "it is quite untrue that, it is not the case that, it is impossible that"
                )
            },
            "perhaps": {
                "cue": split_words(
                    "it is possible that, people say that, some suppose that, "
                    "it may be that, there is some hope that, perhaps it is so that"
                )
            },
        },
        related=("inference_witness", "inference_number"),
    ),
)

TASKS = (*_SENTIMENT, *_TOPIC, *_INFERENCE)
