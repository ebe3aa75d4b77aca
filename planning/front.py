"""The Pareto front of all predicted steps: those than which no other is both smaller and faster."""

from dataclasses import dataclass

from planning.budget import Budget
from planning.predictions import Prediction


@dataclass(frozen=True)
class Front:
    """`steps`: all that were predicted, each once."""

    steps: list[Prediction]

    @classmethod
    def of(cls, seen: list[Prediction]) -> "Front":
        """Without the steps that cannot be."""
        once: list[Prediction] = []
        for step in seen:
            if step.problem is None and step not in once:
                once.append(step)
        return cls(once)

    @property
    def least(self) -> Prediction:
        """The step that takes the least of the device."""
        return min(self.steps, key=lambda step: step.device_bytes)

    @property
    def best(self) -> list[Prediction]:
        """The front itself, from the least memory to the most tokens a second."""
        front: list[Prediction] = []
        for step in sorted(self.steps, key=lambda step: (step.device_bytes, -step.tokens_per_second)):
            if not front or step.tokens_per_second > front[-1].tokens_per_second:
                front.append(step)
        return front

    def shown(self, chosen: Prediction | None, most: int) -> list[Prediction]:
        """At most so many of the front's steps: those nearest to the chosen one, and the two ends."""
        steps = self.best
        if chosen is not None and chosen not in steps:
            steps = sorted([*steps, chosen], key=lambda step: step.device_bytes)
        if len(steps) <= most:
            return steps
        middle = 0 if chosen is None else steps.index(chosen)
        inner = sorted(range(1, len(steps) - 1), key=lambda index: abs(index - middle))[: most - 2]
        return [steps[index] for index in (0, *sorted(inner), len(steps) - 1)]

    def next_faster(self, chosen: Prediction, budget: Budget) -> Prediction | None:
        """Of the faster steps, none of which fits, the one that needs least."""
        faster = [step for step in self.steps if step.tokens_per_second > chosen.tokens_per_second]
        return min(faster, key=budget.needed_bytes, default=None)
