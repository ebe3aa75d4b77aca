"""What was allocated and freed, in order: a trace makes it, a prediction is computed from it."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from memory.categories import CATEGORIES
from memory.work import Operation


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
    index of a phase's first event, and its name. `notes` are sentences for a reader. `work` is what the
    last update asks of host and GPU, by micro-batch; it is empty for a CPU.
    """

    events: list[tuple[int, Allocation]] = field(default_factory=list)
    phase_starts: list[tuple[int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    work: list[list[Operation]] = field(default_factory=list)

    def timeline(self) -> list[int]:
        """Bytes in use after each event."""
        return list(accumulate(nbytes for nbytes, _ in self.events))

    @property
    def peak_bytes(self) -> int:
        return max(self.timeline(), default=0)

    @property
    def peak_index(self) -> int:
        """The event with which the peak is reached; 0 where there is none."""
        timeline = self.timeline()
        return timeline.index(max(timeline)) if timeline else 0

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
        for (start, phase), (end, _) in pairwise(starts):
            peaks[phase] = max([peaks[phase], *timeline[max(start - 1, 0) : end]])
        return peaks

    def largest_at_peak(self, count: int = 10) -> list[Allocation]:
        """The largest allocations alive at the peak, largest first."""
        return sorted(self.alive_at(self.peak_index), key=lambda allocation: -allocation.nbytes)[:count]
