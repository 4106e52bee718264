"""What a stage learns from: the system's own losses of its data, or another thing that knows how to ask the system."""

from __future__ import annotations

import abc

from torch import Tensor

from diptych.core.draws import Draws
from diptych.core.prepared import PreparedBatch, Preparer
from diptych.systems.base import System


class Objective(abc.ABC):
    """Named losses of prepared samples; `System.losses` says what they are like."""

    @abc.abstractmethod
    def preparer(self, system: System) -> Preparer:
        """What makes tensors of samples for `losses`, in the workers of a loader."""

    @abc.abstractmethod
    def losses(self, system: System, batch: PreparedBatch, draws: Draws) -> dict[str, Tensor]:
        """Unweighted values by term ("flow.image"), one for each sample of the term's task."""

    def passes(self, system: System, batch: PreparedBatch) -> int:
        """As of `System.passes`."""
        return 1


class OwnLosses(Objective):
    """The system's own losses: what its data say."""

    def preparer(self, system: System) -> Preparer:
        return system.preparer()

    def losses(self, system: System, batch: PreparedBatch, draws: Draws) -> dict[str, Tensor]:
        return system.losses(batch, draws)

    def passes(self, system: System, batch: PreparedBatch) -> int:
        return system.passes(batch)


OWN_LOSSES = OwnLosses()
