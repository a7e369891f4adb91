"""Which question is asked? Words of the coloured objects, and draws of ordered choices that are all different."""

from __future__ import annotations

from collections.abc import Sequence

from interp.models.model import Model
from interp.tasks._prompts import column, continuation, single_words


def arrangement(number: int, items: Sequence[str], count: int) -> list[str]:
    """One of the `math.perm(len(items), count)` ordered choices of `count` different items, by its number.

    Different numbers give different choices, so that numbers drawn without replacement give prompts without repeats.
    """
    left, chosen = list(items), []
    for _ in range(count):
        number, index = divmod(number, len(left))
        chosen.append(left.pop(index))
    return chosen


def coloured_words(model: Model, task: str, *, colours: int, objects: int) -> tuple[list[str], list[str], str]:
    """Colours and objects that are one token inside a sentence, and how many of how many there are.

    A colour must be one token with a capital after "A:" too, where it is the answer of `coloured_objects`.

    Args:
        model: whose tokenizer is used.
        task: name for the error message.
        colours: how many different colours a prompt takes.
        objects: how many different objects a prompt takes.

    Raises:
        ValueError: when the tokenizer has fewer as single tokens.
    """
    listed = column("colours", "colour"), column("coloured_objects", "object")
    kept = [single_words(model, words) for words in listed]
    kept[0] = [word for word in kept[0] if continuation(model, "A:", f" {word.title()}") is not None]
    counts = f"colours {len(kept[0])} of {len(listed[0])}, objects {len(kept[1])} of {len(listed[1])}"
    if len(kept[0]) < colours or len(kept[1]) < objects:
        raise ValueError(
            f"{task}: a prompt takes {colours} colours and {objects} objects that are single tokens, but "
            f"{model.name}'s tokenizer has only: {counts}."
        )
    return kept[0], kept[1], counts
