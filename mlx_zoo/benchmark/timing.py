"""What a list of seconds says, and what two of them say of each other."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Runs of one case, in seconds, round by round."""

    rounds: tuple[tuple[float, ...], ...]

    @property
    def seconds(self) -> list[float]:
        return [x for one in self.rounds for x in one]

    @property
    def num_runs(self) -> int:
        return len(self.seconds)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.seconds)

    @property
    def std(self) -> float:
        """Of a sample; 0 of a single run."""
        return statistics.stdev(self.seconds) if self.num_runs > 1 else 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def medians(self) -> list[float]:
        """Of each round."""
        return [statistics.median(one) for one in self.rounds]

    def percentile(self, p: float) -> float:
        """The p-th, from 0 to 100; between two runs, on the line through them."""
        return percentile(self.seconds, p)

    def to_json(self) -> dict[str, float | int | list[float]]:
        """Seconds."""
        return {
            "runs": self.num_runs,
            "mean": self.mean,
            "std": self.std,
            "min": min(self.seconds),
            "p50": self.median,
            "p95": self.percentile(95),
            "p99": self.percentile(99),
            "rounds": self.medians,
        }


def percentile(values: Sequence[float], p: float) -> float:
    """The p-th percentile of at least one value, with linear interpolation."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * p / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Ratio:
    """Our time over theirs: 0.5 is twice as fast."""

    median: float  # of the rounds' own ratios: what drifts from round to round cancels
    low: float  # the smallest of them
    high: float
    of_medians: float  # of all runs

    @classmethod
    def of(cls, ours: Timing, theirs: Timing) -> Ratio:
        """Of rounds that alternated."""
        pairs = zip(ours.medians, theirs.medians, strict=True)
        ratios = [a / b for a, b in pairs]
        return cls(statistics.median(ratios), min(ratios), max(ratios), ours.median / theirs.median)
