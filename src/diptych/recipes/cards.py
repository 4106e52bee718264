"""Cards by name or by memory: what they hold and how fast they multiply, for the memory and time that `check` says."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diptych.core.errors import UserError, unknown
from diptych.recipes.fit import CONTEXT_BYTES, memory

DAY = 86400.0
UTILISATION = 0.4
"""Share of a card's peak that a run reaches where nothing else is said; large dense models reach 0.35 to 0.55."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """name: as given. memory: bytes. bf16, fp32: floating-point operations a second at most, of dense products with
    float32 sums, as the maker states them; None where they are not known. fp32 is without TF32."""

    name: str
    memory: int
    bf16: float | None = None
    fp32: float | None = None

    @property
    def room(self) -> int:
        """Bytes for tensors: the driver and kernels take the rest."""
        return self.memory - CONTEXT_BYTES["cuda"]

    def peak(self, precision: str) -> float | None:
        """Of a run's precision ("bf16", "fp32")."""
        return self.bf16 if precision == "bf16" else self.fp32


GB, TERA = 10**9, 10**12
CARDS = {
    name: Card(name=name, memory=gigabytes * GB, bf16=bf16 * TERA, fp32=fp32 * TERA)
    for name, gigabytes, bf16, fp32 in (
        ("rtx3090", 24, 71.0, 35.6),
        ("rtx4090", 24, 165.2, 82.6),
        ("rtx5090", 32, 209.5, 104.8),
        ("a10", 24, 125.0, 31.2),
        ("l4", 24, 121.0, 30.3),
        ("a6000", 48, 154.8, 38.7),
        ("l40s", 48, 362.0, 91.6),
        ("a100-40gb", 40, 312.0, 19.5),
        ("a100", 80, 312.0, 19.5),
        ("h100", 80, 989.4, 66.9),
        ("h200", 141, 989.4, 66.9),
        ("b200", 180, 2250.0, 75.0),
        ("mi300x", 192, 1307.4, 163.4),
    )
}
"""By the makers' data sheets, without sparsity."""


def card_named(text: str, peak: float | None = None) -> Card:
    """A card by its name ("h100"), or one of so much memory ("24GB").

    Args:
        peak: operations a second in units of 10^12, in the run's precision; replaces what is known.

    Raises:
        UserError: neither a known name nor a memory, or a peak that is not above 0.
    """
    if peak is not None and not 0 < peak < float("inf"):
        raise UserError(f"--peak must be above 0 (10^12 operations a second), not {peak}")
    known = CARDS.get(text.strip().lower())
    if known is None and not text.strip()[:1].isdigit():
        raise unknown("card", text, CARDS, "--card, a name or a memory such as 24GB")
    card = known or Card(name=text.strip(), memory=memory(text, "--card"))
    return card if peak is None else replace(card, bf16=peak * TERA, fp32=peak * TERA)


def days(flops: float, processes: int, peak: float, utilisation: float) -> float:
    """Days that so many operations take on so many cards, each at a share of its peak (operations a second).

    Raises:
        UserError: a share that is not above 0 and at most 1.
    """
    if not 0 < utilisation <= 1:
        raise UserError(f"--mfu must be above 0 and at most 1, not {utilisation}")
    return flops / (processes * peak * utilisation) / DAY


def shortfall(card: Card, needed: int) -> int:
    """Bytes that are missing on a card; 0 where it holds what is needed."""
    return max(0, needed - card.room)
