"""What was allocated and freed, in order: a trace makes it, a prediction is computed from it."""

from collections import Counter
from dataclasses import dataclass, field

from memory.categories import CATEGORIES


PHASES = ("load", "forward", "backward", "step", "save", "evaluate")


class TraceError(Exception):
    """The code does something whose memory cannot be known without its data. The message names the operator."""


@dataclass(eq=False)
class Allocation:
    """One storage: `start` and `end` (None: never freed) are positions in the record's event list."""

    nbytes: int
    shape: tuple[int, ...]
    dtype: str
    op: str
    module: str
    phase: str
    start: int
    category: str | None = None
    end: int | None = None
    made_in_forward: bool = False
    saved_for_backward: bool = False
    stream: int = 0


@dataclass
class Record:
    """What was allocated and freed, in order, and what follows from it. All figures are bytes.

    `events` holds (bytes, allocation): positive bytes at its start, negative at its end. `phase_starts` holds the
    index of a phase's first event, and its name.
    """

    events: list[tuple[int, Allocation]] = field(default_factory=list)
    phase_starts: list[tuple[int, str]] = field(default_factory=list)

    def timeline(self) -> list[int]:
        """Bytes in use after each event."""
        total, totals = 0, []
        for nbytes, _ in self.events:
            total += nbytes
            totals.append(total)
        return totals

    @property
    def peak_bytes(self) -> int:
        return max(self.timeline())

    @property
    def peak_index(self) -> int:
        """The event with which the peak is reached."""
        timeline = self.timeline()
        return timeline.index(max(timeline))

    def alive_at(self, index: int) -> list[Allocation]:
        """What is in use after event `index`, in order of allocation."""
        started = [allocation for nbytes, allocation in self.events[: index + 1] if nbytes >= 0]
        return [allocation for allocation in started if allocation.end is None or allocation.end > index]

    def breakdown(self) -> dict[str, int]:
        """The bytes of each category at the peak; they add up to `peak_bytes`."""
        sums = Counter({category.name: 0 for category in CATEGORIES})
        for allocation in self.alive_at(self.peak_index):
            sums[allocation.category] += allocation.nbytes
        return dict(sums)

    def phase_peaks(self) -> dict[str, int]:
        """The most that was in use during each phase."""
        peaks = dict.fromkeys(PHASES, 0)
        starts = [*self.phase_starts, (len(self.events), "")]
        timeline = self.timeline()
        for (start, phase), (end, _) in zip(starts, starts[1:], strict=False):
            in_use = timeline[max(start - 1, 0) : end]
            peaks[phase] = max([peaks[phase], *in_use])
        return peaks

    def largest_tensors(self, count: int = 10) -> list[dict[str, object]]:
        """The largest tensors alive at the peak, largest first."""
        alive = sorted(self.alive_at(self.peak_index), key=lambda allocation: -allocation.nbytes)
        keys = ("nbytes", "shape", "dtype", "category", "module", "op")
        return [{key: getattr(allocation, key) for key in keys} for allocation in alive[:count]]
