"""Find the fastest step that fits.

Memory and speed both grow with the layers that keep their activations, so that for a number of rows the last step that
fits is found between two known ones. Where it lies, a straight line between them tells nearly.
"""

from dataclasses import dataclass, field

from memory.config import ProbeConfig
from planning.budget import Budget
from planning.config import PlanConfig
from planning.predictions import Prediction, Predictions, num_processes
from planning.space import (
    Flags,
    allowed_changes,
    between,
    changed,
    knots,
    row_choices,
    strategies,
    tighter,
)
from utils import UserError


WORTH = 1.01  # how much faster a number of rows must promise to be, for its steps to be looked at


@dataclass(frozen=True)
class Found:
    """The fastest step that fits, None if there is none, and what --allow had to change for it."""

    chosen: Prediction | None
    changes: Flags


@dataclass(eq=False)
class Ladder:
    """For a number of rows, ways to checkpoint from the least memory to the least time, and what is known of them."""

    flags: Flags
    rungs: list[Flags]
    known: dict[int, Prediction]

    def gap(self, budget: Budget) -> tuple[int, int] | None:
        """The last known rung that fits and the first that does not, if there are any between them."""
        low = max(index for index, step in self.known.items() if budget.fits(step))
        high = min((index for index, step in self.known.items() if not budget.fits(step)), default=low)
        return (low, high) if low < high - 1 else None

    def share(self, budget: Budget) -> float:
        """How far up the gap the budget reaches, by a straight line."""
        low, high = (self.known[index] for index in self.gap(budget))
        need, most = budget.needed_bytes(low), budget.needed_bytes(high)
        if high.problem is not None or most <= need:
            return 0.5
        return min(max((budget.device_bytes - need) / (most - need), 0.0), 1.0)

    def promise(self, budget: Budget) -> float:
        """Tokens a second that the best rung may reach; 0 where there is no gap."""
        if (gap := self.gap(budget)) is None:
            return 0.0
        low, high = (self.known[index] for index in gap)
        slow, fast = 1 / low.tokens_per_second, 1 / (high.tokens_per_second or low.tokens_per_second)
        return 1 / (slow + self.share(budget) * (fast - slow))

    def guesses(self, budget: Budget, number: int) -> list[int]:
        """The rungs to look at next: those around the one up to which the budget seems to reach."""
        low, high = self.gap(budget)
        guess = min(max(low + int(self.share(budget) * (high - low)), low + 1), high - 1)
        return sorted(range(low + 1, high), key=lambda index: abs(index - guess - 0.1))[:number]


@dataclass
class Searcher:
    """Predicts steps, and remembers them all in `seen`."""

    config: PlanConfig
    budget: Budget
    predictions: Predictions
    seen: list[Prediction] = field(default_factory=list)

    def fastest(self, flags: Flags) -> Prediction | None:
        """The fastest step with these flags that fits; None: there is none."""
        ladders = self.ladders(flags)
        while ladders:
            best = self.best(ladders)
            # The rung above the choice is to be known; other rows have to be worth it.
            own = next(ladder for ladder in ladders if best in ladder.known.values())
            promises = {own: own.promise(self.budget)} | {
                ladder: ladder.promise(self.budget) / WORTH for ladder in ladders if ladder is not own
            }
            ladder = max(promises, key=promises.get)
            if promises[ladder] <= best.tokens_per_second:
                return best
            self.climb(ladder)
        return None

    def best(self, ladders: list[Ladder]) -> Prediction:
        steps = [step for ladder in ladders for step in ladder.known.values() if self.budget.fits(step)]
        return max(steps, key=lambda step: step.tokens_per_second)

    def ladders(self, flags: Flags) -> list[Ladder]:
        """One for each number of rows that is worth it, its knots known where they matter."""
        least, *others = knots(self.config)
        rows = self.rows_worth_it([flags | choice for choice in row_choices(self.config)], least)
        if not others:  # nothing to choose
            return [Ladder(row, [least], {0: low}) for row, low in rows]
        middle, most = others
        highs = self.predict([row | most for row, _ in rows])
        is_open = [not self.budget.fits(high) for high in highs]
        middles = iter(self.predict([row | middle for (row, _), opened in zip(rows, is_open, strict=True) if opened]))
        return [
            self.ladder(row, low, next(middles) if opened else None, high)
            for (row, low), opened, high in zip(rows, is_open, highs, strict=True)
        ]

    def ladder(self, row: Flags, low: Prediction, middle: Prediction | None, high: Prediction) -> Ladder:
        """It goes by the knot in the middle if a byte gives back more time up to there than up to the end."""
        through_mlps = middle is not None and middle.problem is None and gain(low, middle) > gain(low, high)
        rungs = between(self.config, through_mlps)
        known = {0: low, len(rungs) - 1: high}
        return Ladder(row, rungs, known | ({len(rungs) // 2: middle} if through_mlps else {}))

    def rows_worth_it(self, rows: list[Flags], least: Flags) -> list[tuple[Flags, Prediction]]:
        """Those that fit with the least memory, each with its prediction. More rows take more memory and gain ever
        less speed, so the first that does not fit or gains nothing ends the list."""
        found: list[tuple[Flags, Prediction]] = []
        while rows:
            number = num_processes() if found else 1  # often not even the first fits
            some, rows = rows[:number], rows[number:]
            for row, step in zip(some, self.predict([row | least for row in some]), strict=True):
                if not self.budget.fits(step):
                    return found
                if found and step.tokens_per_second < WORTH * found[-1][1].tokens_per_second:
                    return found
                found.append((row, step))
        return found

    def climb(self, ladder: Ladder) -> None:
        """Close the gap: afterwards the rung above the best one is known not to fit."""
        while ladder.gap(self.budget) is not None:
            guesses = ladder.guesses(self.budget, num_processes())
            steps = self.predict([ladder.flags | ladder.rungs[index] for index in guesses])
            ladder.known |= dict(zip(guesses, steps, strict=True))

    def predict(self, flags: list[Flags]) -> list[Prediction]:
        """A prediction for each, also for flags that cannot be."""
        typed = self.config.probe_config
        configs = [changed(typed, each) for each in flags]
        possible = iter(self.predictions.of(each for each in configs if isinstance(each, ProbeConfig)))
        steps = [
            next(possible) if isinstance(each, ProbeConfig) else Prediction(typed, problem=each) for each in configs
        ]
        self.seen += steps
        return steps


def gain(slower: Prediction, faster: Prediction) -> float:
    """Seconds that a byte gives back."""
    nbytes = max(faster.device_bytes - slower.device_bytes, 1)
    return (slower.step_seconds - faster.step_seconds) / nbytes


def search(searcher: Searcher) -> Found:
    """First in the device's memory alone, with nothing changed of what is learnt; then with what --allow names, little
    by little; then the same with host memory.

    Raises:
        UserError: no step can be predicted at all.
    """
    config = searcher.config
    for strategy in strategies(config):
        for changes in allowed_changes(config):
            for tight in tighter(config):
                chosen = searcher.fastest(strategy | changes | tight)
                if chosen is not None:
                    return Found(chosen, changes)
    if all(step.problem is not None for step in searcher.seen):
        raise UserError(searcher.seen[0].problem)
    return Found(None, {})
