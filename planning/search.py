"""Find the fastest step that fits.

Memory and speed both grow with the layers that keep their activations, so that for a number of rows the last step that
fits is found between two known ones. Where it lies, a straight line between them tells nearly.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from memory.config import ProbeConfig
from planning.budget import Budget
from planning.config import ALLOWED, PlanConfig
from planning.predictions import Prediction, Predictions, num_processes
from planning.space import (
    Flags,
    changed,
    paths,
    row_choices,
    strategies,
    tighter,
    values_of,
)
from utils import UserError


WORTH = 1.01  # how much faster than fewer rows a number of rows must be, for more of its steps to be looked at


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

    def fastest(self, flags: Flags) -> Prediction:
        """The fastest step with these flags that fits. There is one."""
        ladders = self.ladders(flags)
        while True:
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

    def best(self, ladders: list[Ladder]) -> Prediction:
        steps = [step for ladder in ladders for step in ladder.known.values() if self.budget.fits(step)]
        return max(steps, key=lambda step: step.tokens_per_second)

    def ladders(self, flags: Flags) -> list[Ladder]:
        """One for each number of rows that is worth it. What lies in the middle matters where the end does not fit."""
        by_layers, *to_mlps = paths(self.config)
        rows = self.rows_worth_it([flags | choice for choice in row_choices(self.config)], by_layers[0])
        if len(by_layers) == 1:  # nothing to choose
            return [Ladder(row, by_layers, {0: low}) for row, low in rows]
        highs = self.predict([row | by_layers[-1] for row, _ in rows])
        ladders = [
            Ladder(row, by_layers, {0: low, len(by_layers) - 1: high})
            for (row, low), high in zip(rows, highs, strict=True)
        ]
        if to_mlps:
            self.turn_to_mlps([each for each in ladders if each.gap(self.budget) is not None], to_mlps[0])
        return ladders

    def turn_to_mlps(self, ladders: list[Ladder], rungs: list[Flags]) -> None:
        """Let those go by the other path in which a byte gives back more time up to its middle than up to the end."""
        middle = next(index for index, rung in enumerate(rungs) if rung["checkpoint_num_layers"] == 0)  # all MLPs
        steps = self.predict([ladder.flags | rungs[middle] for ladder in ladders])
        for ladder, step in zip(ladders, steps, strict=True):
            low, high = ladder.known[0], ladder.known[len(ladder.rungs) - 1]
            if step.problem is None and gain(low, step) > gain(low, high):
                ladder.rungs, ladder.known = rungs, {0: low, middle: step, len(rungs) - 1: high}

    def rows_worth_it(self, rows: list[Flags], least: Flags) -> list[tuple[Flags, Prediction]]:
        """Those that fit with the least memory, each with its prediction, and are faster than all with fewer rows.
        More rows take more memory, so the first that does not fit ends the list. They are not always faster: a GPU
        computes some shapes better than others."""
        found: list[tuple[Flags, Prediction]] = []
        fastest = 0.0
        number = 1  # often not even the first fits
        while rows:
            some, rows = rows[:number], rows[number:]
            for row, step in zip(some, self.predict([row | least for row in some]), strict=True):
                if not self.budget.fits(step):
                    return found
                if step.tokens_per_second >= WORTH * fastest:
                    found.append((row, step))
                    fastest = step.tokens_per_second
            number = num_processes()
        return found

    def smallest(self, flags: Flags) -> tuple[Flags, Prediction]:
        """The step that takes the least memory, with these flags; and the flags, with what it takes besides. It is the
        first of those that `tighter` makes ever smaller that fits, or the last."""
        row, rung = row_choices(self.config)[0], paths(self.config)[0][0]
        for tight in tighter(self.config):
            (step,) = self.predict([flags | row | rung | tight])
            if self.budget.fits(step):
                break
        return flags | tight, step

    def with_few_changes(self, flags: Flags) -> tuple[Flags, Flags] | None:
        """The flags with which something fits, and what --allow had to change for it: ever more, one thing at a time
        and the least harmful first; then without those changes for which later ones have made up."""
        tight, step = self.smallest(flags)
        if self.budget.fits(step):
            return tight, {}
        changes: dict[str, Flags] = {}  # by the word of --allow
        for word in (word for word in ALLOWED if word in (self.config.allow or ())):
            for change in self.values_of(word, changes):
                tight, step = self.smallest(flags | merged(changes) | change)
                if step.problem is None:
                    changes[word] = change
                if self.budget.fits(step):
                    return self.without_needless(flags, changes) or (tight, merged(changes))
        return None

    def without_needless(self, flags: Flags, changes: dict[str, Flags]) -> tuple[Flags, Flags] | None:
        """The most harmful first; the last change was needed. None: all are."""
        found = None
        for word in list(changes)[-2::-1]:
            for milder in ({}, *self.values_of(word, {})):
                if milder == changes[word]:
                    break
                fewer = changes | {word: milder}
                tight, step = self.smallest(flags | merged(fewer))
                if self.budget.fits(step):
                    changes, found = fewer, (tight, merged(fewer))
                    break
        return found

    def values_of(self, word: str, changes: dict[str, Flags]) -> Iterator[Flags]:
        config = changed(self.config.probe_config, merged(changes))
        for values in values_of(config, word):
            yield {name: value for name, value in values.items() if name not in self.config.locked}

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


def merged(changes: dict[str, Flags]) -> Flags:
    return {name: value for change in changes.values() for name, value in change.items()}


def gain(slower: Prediction, faster: Prediction) -> float:
    """Seconds that a byte gives back; nothing where the faster one cannot be."""
    if faster.problem is not None:
        return 0.0
    nbytes = max(faster.device_bytes - slower.device_bytes, 1)
    return (slower.step_seconds - faster.step_seconds) / nbytes


def search(searcher: Searcher) -> Found:
    """First in the device's memory alone, with nothing changed of what is learnt; then with what --allow names, little
    by little; then the same with host memory.

    Raises:
        UserError: no step can be predicted at all.
    """
    for strategy in strategies(searcher.config):
        found = searcher.with_few_changes(strategy)
        if found is not None:
            flags, changes = found
            return Found(searcher.fastest(flags), changes)
    if all(step.problem is not None for step in searcher.seen):
        raise UserError(searcher.seen[0].problem)
    return Found(None, {})
