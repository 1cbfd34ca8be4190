"""How often each sample is drawn: the mixture of data sets and tasks, in exact proportions, without dice.

Samples that are drawn alike form a stratum: a data set, or one task of it. An epoch holds ``draws`` of each stratum, and
every window of it the same share of them, to within one sample. Draw ``k`` of a stratum of ``n`` samples is number
``k % n`` of its shuffled order number ``k // n``: however often a stratum is drawn, the counts of its samples differ by
one at most. Without a mixture all samples are one stratum, drawn once per epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import xxhash

from megatron_omni.config.recipe import MixtureConfig
from megatron_omni.data.rows.permutation import shuffled
from megatron_omni.runtime.errors import InputError


class Numbers(Protocol):
    """Which samples: an array of their numbers, or something as good."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: np.ndarray, /) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Span:
    """The numbers from ``start`` to before ``stop`` but a few; takes no memory for the others."""

    start: int
    stop: int
    without: np.ndarray
    """int64, ascending, within the span."""

    def __len__(self) -> int:
        return self.stop - self.start - len(self.without)

    def __getitem__(self, places: np.ndarray, /) -> np.ndarray:
        before = self.without - self.start - np.arange(len(self.without))  # samples that stay before each that does not
        return self.start + places + np.searchsorted(before, places, side="right")


@dataclass(frozen=True, eq=False)
class Stratum:
    key: str
    """What its order is seeded with; it does not name a place on a disk."""
    name: str
    """For people: the data set, and the task after a colon where tasks are told apart."""
    numbers: Numbers
    draws: int
    """Per epoch."""
    demand: np.ndarray
    """int64 [5]: summed over its samples, each once."""

    def drawn(self, seed: int, windows: int, ordinal: int) -> np.ndarray:
        """int64: numbers of the samples of window ``ordinal``, of ``windows`` per epoch."""
        draws = np.arange(self.draws * ordinal // windows, self.draws * (ordinal + 1) // windows)
        if len(draws) == 0:
            return draws
        size = len(self.numbers)
        passes = range(int(draws[0]) // size, int(draws[-1]) // size + 1)
        return self.numbers[np.concatenate([shuffled(draws[draws // size == n] % size, size, seed, "epoch", self.key, n) for n in passes])]


@dataclass(frozen=True)
class Share:
    """What a mixture makes of one stratum."""

    name: str
    samples: int
    draws: int
    """Per epoch."""
    passes: float
    """Times that each of its samples is drawn per epoch."""
    tokens: float
    """Its share of the LLM positions, 0 to 1."""


@dataclass(frozen=True, eq=False)
class Mixture:
    strata: tuple[Stratum, ...]

    @classmethod
    def whole(cls, count: int, demand: np.ndarray, without: np.ndarray | None = None) -> Mixture:
        """Every one of ``count`` samples once per epoch, but ``without``; ``demand`` int64 [5] is that of those that stay."""
        numbers = Span(0, count, np.empty(0, np.int64) if without is None else without)
        return cls((Stratum("", "all", numbers, len(numbers), demand),))

    @property
    def samples(self) -> int:
        return sum(len(stratum.numbers) for stratum in self.strata)

    @property
    def demand(self) -> np.ndarray:
        """int64 [5], of an epoch."""
        return np.sum([stratum.demand * stratum.draws // max(len(stratum.numbers), 1) for stratum in self.strata], 0)

    def drawn(self, seed: int, windows: int, ordinal: int) -> np.ndarray:
        """int64: numbers of the samples of window ``ordinal``, of ``windows`` per epoch."""
        return np.concatenate([stratum.drawn(seed, windows, ordinal) for stratum in self.strata])

    @property
    def fingerprint(self) -> str:
        """Of what is drawn how often; empty where all samples are one stratum, drawn once."""
        if len(self.strata) == 1 and not self.strata[0].key:
            return ""
        text = "; ".join(f"{stratum.key} {len(stratum.numbers)} {stratum.draws}" for stratum in self.strata)
        return xxhash.xxh3_64_hexdigest(text.encode())

    def shares(self) -> list[Share]:
        total = max(int(self.demand[0]), 1)
        return [
            Share(
                stratum.name,
                len(stratum.numbers),
                stratum.draws,
                stratum.draws / max(len(stratum.numbers), 1),
                float(stratum.demand[0]) * stratum.draws / max(len(stratum.numbers), 1) / total,
            )
            for stratum in self.strata
        ]


def draws(config: MixtureConfig, amounts: Sequence[float], sizes: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """Draws per epoch of strata that have these amounts, numbers of samples, and LLM positions (all parallel).

    By epochs and at temperature 1, an amount is the passes of an epoch; else an epoch has as many LLM positions as the
    strata that are drawn from have together.

    Raises:
        InputError: nothing is left to draw from.
    """
    size_T = np.array(tokens, np.float64)
    wanted = np.array(amounts, np.float64) * (size_T if config.by == "epochs" else 1)
    if not (wanted > 0).any():
        raise InputError("data.mixture leaves no samples: every data set or task that there is has the weight 0")
    if config.by == "tokens" or config.temperature != 1:
        used = wanted > 0
        wanted[used] = wanted[used] ** (1 / config.temperature)
        wanted *= size_T[used].sum() / wanted.sum()
    return [max(1, round(count * want / size)) if want > 0 else 0 for want, count, size in zip(wanted, sizes, size_T, strict=True)]
