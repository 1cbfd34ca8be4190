"""Which samples are drawn, and how often: the recipe's mixture and its policy for long samples, applied to a data set.

A sample that no row holds is refused, left out, or split: a conversation is cut between exchanges (a user's turns and the
answer to them), each part as long as a row allows and with the system message, if there is one, before it. Later parts do
not see the earlier ones. One exchange that no row holds is never cut; its sample is refused.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.config.model import CodecConfig
from megatron_omni.config.recipe import MixtureConfig
from megatron_omni.data.rows.demands import Demands, Samples, measure_one
from megatron_omni.data.rows.mixture import Mixture, Stratum, draws
from megatron_omni.data.rows.plan import capacity, describe_too_long
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.logs import get_logger
from megatron_omni.schema import TASKS, Message, RowShape, Sample, SampleArrays

logger = get_logger(__name__)

LongSamples = Literal["refuse", "drop", "split"]


@dataclass(frozen=True, eq=False)
class Selection:
    samples: Samples
    """The data set; parts of split samples are numbered on after its own."""
    demands: Demands
    """Of ``samples``."""
    mixture: Mixture
    dropped: np.ndarray
    """int64: numbers of the samples that were left out because no row holds them."""
    split: np.ndarray
    """int64: numbers of the samples whose parts stand for them."""


def select(
    samples: Samples,
    demands: Demands,
    shape: RowShape,
    tokenizer: OmniTokenizer,
    geometry: EncoderGeometry,
    acoustic_delay: int,
    long_samples: LongSamples = "refuse",
    mixture: MixtureConfig | None = None,
) -> Selection:
    """Applies ``data.long_samples`` and ``data.mixture``; what is dropped or split is named in the log.

    Raises:
        InputError: a sample that no row holds and that the policy keeps; a name in the mixture that the data lack; or a
            mixture that leaves nothing.
    """
    mixture = MixtureConfig() if mixture is None else mixture
    folders = samples.folders if isinstance(samples, ShardedDataset) else [("data", len(samples))]
    long = demands.too_long(shape)
    none = np.empty(0, np.int64)
    if len(long) == 0:
        return Selection(samples, demands, _mixture(folders, demands, mixture, none, none), none, none)
    names = describe_too_long(demands.table, long, shape, lambda number: samples.sample(number).id)
    if long_samples == "refuse":
        raise InputError(f"{names}; enlarge the row, or set data.long_samples to drop or split them")
    logger.warning("%s; data.long_samples=%s", names, long_samples)
    if long_samples == "drop":
        return Selection(samples, demands, _mixture(folders, demands, mixture, long, none), long, none)
    parts, needs, origins = [], [demands.table], []
    for number in long.tolist():
        sample = samples.sample(number)
        for first, last, need in _parts(sample, shape, tokenizer, geometry, acoustic_delay):
            parts.append((number, first, last))
            needs.append(need[None])
            origins.append(number)
    tasks = None if demands.tasks is None else np.concatenate([demands.tasks, demands.tasks[origins]])
    together = Demands(np.concatenate(needs), demands.longest_clip, tasks)
    divided = _mixture(folders, together, mixture, long, np.array(origins, np.int64))
    return Selection(SplitSamples(samples, parts), together, divided, none, long)


@dataclass(frozen=True, eq=False)
class SplitSamples:
    """A data set, with parts of some of its conversations numbered on after its samples."""

    base: Samples
    parts: Sequence[tuple[int, int, int]]
    """Number of the sample, first message, and the message after the last."""

    @property
    def fingerprint(self) -> str:
        return self.base.fingerprint

    @property
    def codec(self) -> CodecConfig | None:
        return self.base.codec

    def __len__(self) -> int:
        return len(self.base) + len(self.parts)

    def origin(self, number: int) -> int:
        """The sample of ``base`` that this is, or is a part of."""
        return number if number < len(self.base) else self.parts[number - len(self.base)][0]

    def sample(self, number: int, /) -> Sample:
        if number < len(self.base):
            return self.base.sample(number)
        origin, first, last = self.parts[number - len(self.base)]
        return _part(self.base.sample(origin), first, last)

    def arrays(self, number: int, /) -> SampleArrays:
        if number < len(self.base):
            return self.base.arrays(number)
        part, whole = self.sample(number), self.base.arrays(self.origin(number))
        return SampleArrays({name: whole.audio[name] for name in part.num_samples}, {name: whole.codes[name] for name in part.num_frames})


def _parts(
    sample: Sample, shape: RowShape, tokenizer: OmniTokenizer, geometry: EncoderGeometry, acoustic_delay: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """First message, the one after the last, and the demand of each part; as few parts as can be, from the front."""
    ends = [n + 1 for n, message in enumerate(sample.messages) if message.role == "assistant"]
    first = next((n for n, message in enumerate(sample.messages) if message.role != "system"), 0)
    while first < (ends[-1] if ends else len(sample.messages)):
        fitting = None
        for last in [end for end in ends if end > first]:
            need = measure_one(_part(sample, first, last), tokenizer, geometry, acoustic_delay)
            if (need > capacity(shape)).any():
                break
            fitting = last, need
        if fitting is None:
            raise InputError(
                f"sample {sample.id}: the exchange that begins with message {first} of {len(sample.messages)} alone does not fit "
                f"into a row of {dataclasses.asdict(shape)}, and an exchange is not split; enlarge the row, or set data.long_samples=drop"
            )
        yield first, *fitting
        first = fitting[0]


def _part(sample: Sample, first: int, last: int) -> Sample:
    """Messages ``first`` to before ``last`` as a sample of their own, after the system message."""
    messages: tuple[Message, ...] = tuple(m for m in sample.messages[:first] if m.role == "system") + sample.messages[first:last]
    named = {part.value for message in messages for part in message.content if part.type != "text"}
    return dataclasses.replace(
        sample,
        id=f"{sample.id}#{first}",
        messages=messages,
        num_samples={name: size for name, size in sample.num_samples.items() if name in named},
        num_frames={name: size for name, size in sample.num_frames.items() if name in named},
    )


def _mixture(
    folders: Sequence[tuple[str, int]], demands: Demands, config: MixtureConfig, without: np.ndarray, origins: np.ndarray
) -> Mixture:
    """``without``: numbers that are not drawn. ``origins``: of the samples that parts, numbered from the end of the folders, come from."""
    table = demands.table
    if config == MixtureConfig():
        return Mixture.whole(len(table), demands.total - table[without].sum(0, dtype=np.int64), without)
    _require_names(config, [name for name, _ in folders])
    strata, amounts = [], []
    end = 0
    count = sum(size for _, size in folders)
    for place, (name, size) in enumerate(folders):
        start, end = end, end + size
        amount = config.datasets.get(name, 1.0)
        numbers = np.setdiff1d(np.arange(start, end), without, assume_unique=True)
        numbers = np.concatenate([numbers, count + np.flatnonzero((start <= origins) & (origins < end))])
        parted = [(name, f"{place}", 1.0, numbers)]
        if config.tasks:
            assert demands.tasks is not None
            task_of = demands.tasks[numbers]
            parted = [
                (f"{name}:{task}", f"{place}:{task}", config.tasks.get(task, 1.0), numbers[task_of == number])
                for number, task in enumerate(TASKS)
            ]
        found = [(Stratum(key, label, own, 0, table[own].sum(0, dtype=np.int64)), factor) for label, key, factor, own in parted if len(own)]
        factors = np.array([factor for _, factor in found])
        if config.by == "tokens":  # a data set's amount is shared out among its tasks
            factors = factors * [stratum.demand[0] for stratum, _ in found]
            factors = factors / max(factors.sum(), 1e-12)
        strata += [stratum for stratum, _ in found]
        amounts += (amount * factors).tolist()
    counts = draws(config, amounts, [len(s.numbers) for s in strata], [int(s.demand[0]) for s in strata])
    return Mixture(tuple(dataclasses.replace(stratum, draws=count) for stratum, count in zip(strata, counts, strict=True) if count))


def _require_names(config: MixtureConfig, names: Sequence[str]) -> None:
    for name in config.datasets:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"data.mixture.datasets names {name}, which data.train does not: it has {', '.join(names)}{hint}")
