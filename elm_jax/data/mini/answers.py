"""The tasks of `mini` whose answer is a word or a text of the example: choice to reckoning."""

from __future__ import annotations

import itertools

from elm_jax.data.mini.grammar import COMMON, MiniTask, Prompt, split_words

# --- Choice ------------------------------------------------------------------------------------

_TOOLS = {
    "knife": split_words("cut the bread, cut up the meat, peel an apple"),
    "needle": split_words("mend the stocking, sew on a button, sew the torn dress"),
    "candle": split_words("read in the dark, light the dark stairs, see in the cellar"),
    "key": split_words("open the locked door, open the iron chest, lock up the house"),
    "pen": split_words("write a letter, sign the paper, write down the name"),
    "spade": split_words("dig in the garden, bury the bones, dig a deep hole"),
    "boat": split_words("cross the river, row over the lake, get to the island"),
    "horse": split_words("ride to the town, draw the carriage, gallop over the fields"),
    "kettle": split_words("boil the water, make the tea, make the coffee"),
    "clock": split_words("know the hour, tell the time, find out how late it was"),
    "rope": split_words("tie up the prisoner, fasten the boat, climb down the wall"),
    "broom": split_words("sweep the floor, sweep the steps, clear away the dust"),
    "hammer": split_words("drive in a nail, break the stone, strike the iron"),
    "gun": split_words("shoot the birds, fire at the enemy, hunt the deer"),
    "cup": split_words("drink some water, pour out the milk, drink a little wine"),
    "basket": split_words("carry the eggs, bring home the apples, gather the mushrooms"),
    "bell": split_words("call the servants, wake the whole house, ring for tea"),
    "axe": split_words("cut down the tree, chop the wood, split the logs"),
    "map": split_words("find the way, learn the roads, see where the country lies"),
    "net": split_words("catch the fish, take the birds alive, catch the butterfly"),
}
_KINDS = {
    "an animal": split_words(
        "horse, dog, cat, cow, sheep, lion, mouse, bear, fox, pig, wolf, goat"
    ),
    "something to eat": split_words(
        "cake, pie, loaf, pudding, pear, plum, cherry, nut, biscuit, potato, tart, cheese"
    ),
    "something to wear": split_words(
        "coat, hat, bonnet, glove, shoe, shawl, cap, gown, cloak, boot, shirt, stocking"
    ),
    "a piece of furniture": split_words(
        "table, chair, bed, sofa, desk, shelf, bench, stool, cupboard, carpet, couch, curtain"
    ),
    "a weapon": split_words(
        "sword, gun, spear, dagger, pistol, cannon, rifle, musket, arrow, lance"
    ),
}
_USES = {
    "eat": split_words(
        "cake, pie, loaf, pudding, pear, plum, fish, egg, turnip, sausage, carrot, bun"
    ),
    "wear": split_words(
        "coat, hat, bonnet, glove, shoe, shawl, jacket, veil, apron, collar, wig, ring"
    ),
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
            "wished": split_words("wished, wanted, had, tried, was asked"),
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
            "glad": split_words(
                "laughed and sang, danced for joy, smiled all day, thanked heaven, felt very "
                "happy, shouted with delight, kissed everybody"
            ),
            "sorry": split_words(
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
                "event": split_words(
                    "came into a fortune, found the lost purse, won the race, was praised by the "
                    "king, met an old friend again, got a letter from home, was made a captain, "
                    "was set free, received a fine present, won the prize, got well at last, "
                    "heard the good news"
                ),
            },
            "sorry": {
                "answer": ("{sorry}",),
                "event": split_words(
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
                    for verb in split_words("took, bought, borrowed, stole, received, got")
                ),
            },
            "second": {
                "answer": ("{name2}",),
                "deal": tuple(
                    f"{verb} a {{thing}} to {{name2}}"
                    for verb in split_words("gave, lent, sold, sent, handed, brought")
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
                "other": (
                    *_USES[other],
                    *split_words("sword, gun, pistol, toy, brick, stone, bell"),
                ),
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
            "heir": split_words(
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
                    for verb in split_words("won, bought, took, received, got, seized")
                ),
            },
            "second": {
                "answer": ("{heir2}",),
                "deal": tuple(
                    f"{verb} a {{thing}} to a {{heir2}}"
                    for verb in split_words("left, gave, sold, sent, returned, offered")
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
            "colour": split_words(
                "black, white, red, blue, green, brown, grey, yellow, purple, pink, golden, scarlet"
            ),
            "garment": split_words(
                "coat, hat, bonnet, shawl, cap, gown, cloak, dress, ribbon, glove"
            ),
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
            "place": split_words(
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
            "adjective": split_words(
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
            "went": split_words("walked, ran, rode, went, hurried, came, travelled, marched"),
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
            "adjective": split_words(
                "old, poor, brave, happy, wicked, clever, foolish, faithful, hungry, wild, "
                "gentle, lame"
            ),
            "text": (
                "In this chapter {name} meets a {adjective} {who} near the {place}, and they "
                "become friends.",
                "Here we read how a {adjective} {who} came to the {place} {when} and {deed}.",
            ),
            "who": (*COMMON["animal"], *COMMON["man"]),
        },
        answer="the {adjective} {who}",
        related=("rewriting_title",),
    ),
)

# --- Reckoning: nothing in training teaches it -------------------------------------------------

_NUMBERS = split_words("one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve")

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
            "coin": split_words("shillings, pounds, pennies, guineas"),
            "text": (
                "{name} had {sum}, and no more.",
                "On {day} there were {sum} in the house of {name}.",
            ),
            "spot": split_words("in a box, in a purse, in a drawer, on the table, under the bed"),
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

TASKS = (*_CHOICE, *_EXTRACTION, *_REWRITING, *_RECKONING)
