"""Words of a prompt by what they say: an object, a position, a colour, or something else; and which tokens they are.

Source: Yu et al., Semantic Generative Tuning, App. 7.5 (Fig. 12, step 1).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from diptych.core.errors import UserError, unknown

Category = Literal["object", "position", "color", "other"]
CATEGORIES: tuple[Category, ...] = get_args(Category)

COLORS = frozenset((
    "red", "green", "blue", "yellow", "pink", "cyan", "orange", "purple", "brown", "black", "white", "gray",
    "grey", "beige", "navy", "teal", "lavender",
))  # fmt: skip
POSITIONS = frozenset((
    "left", "right", "above", "below", "top", "bottom", "under", "over", "behind", "front", "beside", "between",
    "inside", "outside", "near",
))  # fmt: skip
OBJECTS = frozenset((
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic", "light",
    "fire", "hydrant", "stop", "sign", "parking", "meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports", "ball", "kite", "baseball", "bat", "glove", "skateboard", "surfboard",
    "tennis", "racket", "bottle", "wine", "glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "broccoli", "carrot", "hot", "pizza", "donut", "cake", "chair", "couch", "potted", "plant", "bed",
    "dining", "table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell", "phone", "microwave",
    "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy", "hair", "drier",
    "toothbrush", "circle", "square", "triangle", "cross",
))  # fmt: skip
"""Words of COCO's 80 categories, which GenEval's prompts name, and the toy world's shapes."""

MARK = re.compile(r"\{([^{}|]+)\|([^{}|]+)\}")
WORD = re.compile(r"[^\W_]+(?:'\w+)?")

PHOTO_PROMPTS: tuple[str, ...] = (
    "a photo of a red tie right of a brown baseball bat",
    "a photo of a blue dog left of a white umbrella",
    "a photo of a yellow bus above a green boat",
    "a photo of a black cat below a red chair",
    "a photo of a purple vase right of an orange book",
    "a photo of a white horse left of a brown bench",
    "a photo of a green apple above a blue bowl",
    "a photo of a pink cup below a black clock",
    "a photo of a red bicycle right of a yellow truck",
    "a photo of a brown bear left of a blue kite",
    "a photo of a white laptop above a red suitcase",
    "a photo of a black bird below a green umbrella",
    "a photo of a yellow banana right of a purple cup",
    "a photo of a blue car left of a red train",
    "a photo of a green bottle above a white couch",
    "a photo of a pink handbag below a brown clock",
    "a photo of a red pizza right of a black keyboard",
    "a photo of a white sheep left of a yellow car",
    "a photo of a purple toothbrush above a green sink",
    "a photo of a brown dog below a blue skateboard",
)
"""Twenty prompts of GenEval's wording with colours and positions; the paper does not print its own."""
TOY_PROMPTS: tuple[str, ...] = (
    "a red circle left of a blue square",
    "a green cross right of a yellow triangle",
    "a pink square above a cyan circle",
    "an orange triangle below a red cross",
    "a blue circle left of a green triangle",
    "a yellow square right of a pink cross",
    "a cyan cross above an orange circle",
    "a red triangle below a blue square",
    "a green circle left of a pink triangle",
    "a yellow cross right of a cyan square",
    "an orange square above a red circle",
    "a blue triangle below a green cross",
    "a pink circle left of a yellow square",
    "a cyan triangle right of an orange cross",
    "a red square above a green circle",
    "a blue cross below a pink triangle",
    "a yellow circle left of a cyan square",
    "an orange cross right of a blue triangle",
    "a green square above a yellow circle",
    "a pink triangle below a red cross",
)


@dataclass(frozen=True)
class Word:
    """A word of a prompt: its text, where it stands there (first and one past the last character), and what it says."""

    text: str
    start: int
    end: int
    category: Category


@dataclass(frozen=True)
class Prompt:
    """A prompt without marks, and its words in order."""

    text: str
    words: tuple[Word, ...]


def parse(line: str) -> Prompt:
    """A prompt with its words told apart.

    By word lists of their own (an `orange` before an object is a colour, another one is an object), or, where the line
    holds marks such as `a {cello|object} {left|position} of a {red|color} door`, by these alone.

    Raises:
        UserError: a mark of an unknown category, or a prompt without words.
    """
    marks: list[tuple[int, int, Category]] = []
    text, at = "", 0
    for match in MARK.finditer(line):
        text += line[at : match.start()]
        named = match[2].strip()
        category: Category | None = next((known for known in CATEGORIES if known == named), None)
        if category is None:
            raise unknown("category", named, CATEGORIES, f"prompt {line!r}")
        marks.append((len(text), len(text) + len(match[1]), category))
        text, at = text + match[1], match.end()
    text += line[at:]
    spans = [(match[0], match.start(), match.end()) for match in WORD.finditer(text)]
    if not spans:
        raise UserError(f"prompt {line!r}: has no words")
    if marks:
        words = [Word(word, a, b, _marked(a, marks)) for word, a, b in spans]
        return Prompt(text, tuple(words))
    kinds: list[Category] = [_kind(word.lower()) for word, _, _ in spans]
    for place, after in enumerate([*kinds[1:], "other"]):
        if spans[place][0].lower() in ("orange", "oranges") and after != "object":
            kinds[place] = "object"
    return Prompt(text, tuple(Word(*span, kind) for span, kind in zip(spans, kinds, strict=True)))


def _marked(at: int, marks: Sequence[tuple[int, int, Category]]) -> Category:
    """The category that the word at a place was marked with."""
    categories: list[Category] = [category for start, stop, category in marks if start <= at < stop]
    return categories[0] if categories else "other"


def _kind(word: str) -> Category:
    if word in COLORS:
        return "color"
    if word in POSITIONS:
        return "position"
    return "object" if {word, word.removesuffix("s"), word.removesuffix("es")} & OBJECTS else "other"


def places(ids: Sequence[int], decode: Callable[[Sequence[int]], str], prompt: Prompt) -> list[int | None]:
    """For each token the number of the prompt's word that it is part of, None for what is no word of the prompt
    (template, markers, spaces, signs).

    A token belongs to the word that its first character that is no space lies in. The prompt is looked for in the
    decoded text, where it must stand once.

    Raises:
        UserError: the prompt is not in the tokens as it is.
    """
    ends = [len(decode(ids[: count + 1])) for count in range(len(ids))]
    whole = decode(ids)
    at = whole.find(prompt.text)
    if at < 0:
        raise UserError(f"prompt {prompt.text!r}: is not in what the model reads ({whole!r})")
    result: list[int | None] = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        piece = whole[start:end]
        inked = start + len(piece) - len(piece.lstrip()) - at
        inside = bool(piece.strip())
        number = next((n for n, word in enumerate(prompt.words) if word.start <= inked < word.end), None)
        result.append(number if inside else None)
    return result
