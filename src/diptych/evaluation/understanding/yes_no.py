"""Which of yes and no a reply says, by the rules that published scores were made with."""

from __future__ import annotations

import re
from typing import Literal

from diptych.evaluation.understanding.text import vqa_unpunctuated

YesNo = Literal["Yes", "No"]

_CHINESE = re.compile("[\u4e00-\u9fa5]")
_SCRIPT_LETTERS = 4


def kit_yes_no(reply: str) -> YesNo | None:
    """VLMEvalKit's rule: the word yes or the word no, if just one of them is there; else None ("Unknown")."""
    words = vqa_unpunctuated(reply.lower()).split()
    yes, no = "yes" in words, "no" in words
    if yes == no:
        return None
    return "Yes" if yes else "No"


def pope_script(reply: str) -> YesNo:
    """POPE's own rule: no if the first sentence holds No, no or not as a word, else yes."""
    words = reply.split(".")[0].replace(",", "").split(" ")
    return "No" if not {"No", "no", "not"}.isdisjoint(words) else "Yes"


def mme_cleaned(reply: str) -> str:
    """A reply as the MME script compares it: one line, lower-case, true, false and Chinese words translated."""
    text = reply.replace("\n", "")
    for word, meant in (("不是", "no"), ("是", "yes"), ("否", "no")):
        text = text.replace(word, meant)
    text = text.lower().replace("true", "yes").replace("false", "no")
    return _CHINESE.sub("", text)


def mme_script(reply: str) -> YesNo | None:
    """The MME script's rule: yes, else no, within the first four characters; else None ("other")."""
    start = mme_cleaned(reply)[:_SCRIPT_LETTERS]
    if "yes" in start:
        return "Yes"
    return "No" if "no" in start else None
