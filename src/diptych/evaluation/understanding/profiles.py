"""Prompt profiles: in which words a benchmark's rows are put to a model.

`plain` is ours. The others put a row as VLMEvalKit does, whose figures papers print: `vlmevalkit` in the words of its
data sets, and the others in those of its class for a family of models, with that class's limit of tokens; `system`
stands for the class of the model at hand. Of the kit's special cases these are kept: what MME, HallusionBench and
MM-Vet get instead. Not kept are its Chinese wordings, and step-by-step prompts of single sizes.

The texts of the kit's profiles are its benchmark prompts, kept to the character, spaces and line ends included: they
are part of what a published score was measured with, and another wording is another score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from diptych.core.errors import UserError, unknown
from diptych.evaluation.understanding import question
from diptych.evaluation.understanding.benchmarks import Benchmark
from diptych.evaluation.understanding.multiple_choice import choices
from diptych.evaluation.understanding.scored import Row
from diptych.parts.backbones.internvl import InternVL
from diptych.parts.backbones.ovis import Ovis
from diptych.parts.backbones.qwen2_5_vl import Qwen2_5VL
from diptych.systems.bagel.network import BagelNetwork

Wording = Callable[[str, Row], str]
"""(benchmark, row) to the text of its question."""
PLAIN, SYSTEM = "plain", "system"
SELECT = "Please select the correct answer from the options above."
LETTER = "Answer with the option's letter from the given choices directly."
DIRECTLY = "Answer the question directly."
PHRASE = "Answer the question using a single word or phrase."
SHORT_WORDS = "Please try to answer the question with short words or phrases if possible."
YES_NO = "Please answer yes or no."
EMPTY = frozenset((
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
))  # fmt: skip
"""Texts that pandas reads as no value, so that the kit does not know an option of this text."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """letter: multiple choice. yes_no, short, bare: questions of these kinds. max_new_tokens: None for the benchmark's
    own limit."""

    letter: Wording
    yes_no: Wording
    short: Wording
    bare: Wording
    max_new_tokens: int | None = None

    def prompt(self, benchmark: Benchmark, row: Row) -> str:
        """A row's question."""
        kinds: dict[question.Prompt, Wording] = {
            question.letter: self.letter,
            question.yes_no: self.yes_no,
            question.short: self.short,
            question.bare: self.bare,
        }
        return kinds[benchmark.prompt](benchmark.name, row)


def without_empty(row: Row) -> Row:
    """A row without the options that pandas reads as no value."""
    empty = [name for name in choices(row) if str(row[name]) in EMPTY]
    return {name: value for name, value in row.items() if name not in empty}


def _kit_letter(name: str, row: Row) -> str:
    options = choices(row)
    hint = f"Hint: {row['hint']}\n" if row.get("hint") else ""
    listed = "".join(f"{letter}. {text}\n" for letter, text in options.items())
    return f"{hint}Question: {row['question']}\n" + (f"Options:\n{listed}{SELECT} \n" if options else "")


def _qwen_letter(name: str, row: Row) -> str:
    return _kit_letter(name, row).rstrip()


def _class_letter(name: str, row: Row) -> str:
    """InternVL's and Ovis's."""
    options = choices(row)
    lines = [str(row["hint"])] if row.get("hint") else []
    lines += [str(row["question"]), *(f"{letter}. {text}" for letter, text in options.items())]
    return "\n".join([*lines, LETTER if options else DIRECTLY])


def _bare(name: str, row: Row) -> str:
    return str(row["question"])


def _phrase(name: str, row: Row) -> str:
    return f"{row['question']}\n{PHRASE}"


def _qwen_yes_no(name: str, row: Row) -> str:
    return f"{row['question']} {YES_NO}" if name in ("hallusion_bench", "pope") else str(row["question"])


def _qwen_words(name: str, row: Row) -> str:
    return str(row["question"]) if name == "mmvet" else f"{row['question']}\n{SHORT_WORDS}"


def _internvl_yes_no(name: str, row: Row) -> str:
    if name == "hallusion_bench":
        return f"{row['question']} {YES_NO} {PHRASE}"
    return f"{row['question']} {PHRASE}" if name == "mme" else str(row["question"])


KIT = Profile(letter=_kit_letter, yes_no=_bare, short=_phrase, bare=_bare)
PROFILES: dict[str, Profile] = {
    "vlmevalkit": KIT,
    "internvl": Profile(letter=_class_letter, yes_no=_internvl_yes_no, short=_phrase, bare=_bare, max_new_tokens=4096),
    "qwen2_5_vl": Profile(
        letter=_qwen_letter, yes_no=_qwen_yes_no, short=_qwen_words, bare=_qwen_words, max_new_tokens=2048
    ),
    "ovis": Profile(letter=_class_letter, yes_no=_phrase, short=_phrase, bare=_bare, max_new_tokens=1024),
    "bagel": Profile(letter=_kit_letter, yes_no=_bare, short=_phrase, bare=_bare, max_new_tokens=1000),
}
NAMES = (PLAIN, SYSTEM, *PROFILES)
FAMILIES: tuple[tuple[type[nn.Module], str], ...] = (
    (BagelNetwork, "bagel"),
    (Ovis, "ovis"),
    (InternVL, "internvl"),
    (Qwen2_5VL, "qwen2_5_vl"),
)
"""Modules by which a system's family is known, in this order."""


def resolve(name: str, system: nn.Module | None) -> str:
    """The name of a profile, `system` as that of the model's own class.

    Raises:
        UserError: no such profile; `system` without a model, or for one that the kit has no class for.
    """
    if name not in NAMES:
        raise unknown("profile", name, NAMES, "--prompts")
    if name != SYSTEM:
        return name
    if system is None:
        raise UserError(f"--prompts system needs a model; without one, name a profile: {', '.join(PROFILES)}")
    for family, profile in FAMILIES:
        if any(isinstance(module, family) for module in system.modules()):
            return profile
    known = ", ".join((PLAIN, *PROFILES))
    raise UserError(f"--prompts system: VLMEvalKit has no class for this model; choices: {known}")
