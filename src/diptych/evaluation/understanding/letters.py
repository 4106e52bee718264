"""Which option a reply to a multiple-choice question names, by the rules that published scores were made with.

`kit_letter` is the rule of VLMEvalKit, and this package's default; the others are those of scripts that report the same
benchmarks. Faults of a published rule are kept: a number is comparable only where the reading is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

Choices = Mapping[str, str]
"""Option texts by letter."""

REFUSED = "Z"
"""What `kit_letter` gives for a reply that declines to answer; it is no choice, so it counts as wrong."""

_NO_REPLY = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_BREAKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_PHRASE = re.compile(r"answer is\s*\**\s*([A-D])", re.IGNORECASE)
_LAST_WORDS = 4
_MMMU_ENDS = ",.!?;:'"
_MMMU_WORDS = 5


def kit_letter(reply: str, choices: Choices, *, phrase: bool = True) -> str | None:
    """The letter by `by_option`, else by `by_text`, else None.

    Args:
        phrase: look for "answer is X" too; older releases of the kit did not.
    """
    return by_option(reply, choices, phrase=phrase) or by_text(reply, choices)


def by_option(reply: str, choices: Choices, *, phrase: bool = True) -> str | None:
    """The one choice letter that stands as a word of its own among the last four words, or after "answer is".

    After "answer is" any word that begins with A to D counts, as published.
    """
    if _NO_REPLY in reply:
        return None
    if any(refusal in reply for refusal in _REFUSALS):
        return REFUSED
    words = reply.translate(_BREAKS).split()
    letters = [letter for letter in choices if letter in words]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - _LAST_WORDS:
        return letters[0]
    if not letters and REFUSED in words:
        return REFUSED
    match = _PHRASE.search(reply) if phrase else None
    letter = match.group(1).upper() if match else None
    return letter if letter in choices else None


def by_text(reply: str, choices: Choices) -> str | None:
    """The one option whose text occurs in the reply, case ignored; None for a reply over twice as long as all."""
    if len(reply) > 2 * sum(len(text) for text in choices.values()):
        return None
    lowered = reply.lower()
    letters = [letter for letter, text in choices.items() if text.lower() in lowered]
    return letters[0] if len(letters) == 1 else None


def mmmu_letter(reply: str, choices: Choices) -> str | None:
    """MMMU's own rule; None where the original picks a letter at random."""
    for mark in _MMMU_ENDS:
        reply = reply.strip(mark)
    padded = f" {reply} "
    forms = [{letter: form.format(letter) for letter in choices} for form in ("({})", " {} ")]
    text = padded
    if len(padded.split()) > _MMMU_WORDS:
        forms.append({letter: option.lower() for letter, option in choices.items()})
    for number, form in enumerate(forms):
        text = padded if number < 2 else padded.lower()
        letters = [letter for letter, mark in form.items() if mark in text]
        if letters:
            return max(letters, key=lambda letter, form=form, text=text: text.rfind(form[letter]))
    return None


def first_character(reply: str, choices: Choices, *, empty: str = "C") -> str:
    """The rule of InternVL's and BAGEL's MMBench scripts; a reply that it cannot read is given back as it is.

    Args:
        empty: what an empty reply is taken for.
    """
    text = reply.strip()
    if not text:
        return empty
    if len(text) == 1 or text[0] in choices:
        return text[0]
    return next((letter for letter, option in choices.items() if option in text), text)
