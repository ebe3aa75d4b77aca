"""What a step may use: the card's memory, less what is kept free, and the computer's RAM."""

from dataclasses import dataclass

from memory.margin import device_margin
from planning.config import PlanConfig
from planning.predictions import Prediction
from utils import GIB, size


@dataclass(frozen=True)
class Budget:
    """All in bytes.

    Args:
        device_bytes: the card's capacity, or --budget_gib.
        reserve_bytes: to leave free, for a screen or another program.
        card_margin_bytes: by which the constants of a card that nobody has measured may be wrong.
        host_bytes: of RAM that a run may use; None: without limit.
        is_shared: the GPU has no memory of its own.
    """

    device_bytes: int
    reserve_bytes: int
    card_margin_bytes: int
    host_bytes: int | None
    is_shared: bool

    @classmethod
    def of(cls, config: PlanConfig) -> "Budget":
        host_bytes = None if config.host_gib is None else int(config.host_gib * GIB)
        card = config.card
        return cls(config.budget_bytes, config.reserve_bytes, card.margin_bytes, host_bytes, card.shares_host_memory)

    def margin_bytes(self, step: Prediction) -> int:
        """By which the measured figure may lie above the predicted one."""
        return int(step.device_bytes * margin_of(step)) + self.card_margin_bytes

    def needed_bytes(self, step: Prediction) -> int:
        """What must be there of the device's memory; on a GPU without memory of its own, of the computer's."""
        shared_bytes = step.host_bytes if self.is_shared else 0
        return step.device_bytes + self.margin_bytes(step) + self.reserve_bytes + shared_bytes

    def fits(self, step: Prediction) -> bool:
        return step.problem is None and not self.excess(step)

    def excess(self, step: Prediction) -> str:
        """What is too much, in a reader's words; nothing where the step fits."""
        over_bytes = self.needed_bytes(step) - self.device_bytes
        if over_bytes > 0:
            return f"{size(over_bytes)} too much for the device"
        if self.host_bytes is not None and step.host_bytes > self.host_bytes:
            return f"{size(step.host_bytes - self.host_bytes)} too much for the host"
        return ""


def margin_of(step: Prediction) -> float:
    return device_margin(step.config.strategy, step.config.loss, step.config.world_size)
