"""The rows of a data set under one recipe: measured, selected and planned; what training starts from and
``tools/pack_sequences.py`` writes down."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.config.recipe import MixtureConfig, Recipe
from megatron_omni.data.rows.demands import Demands, Samples, measure, plan_fingerprint
from megatron_omni.data.rows.materialize import MaterializedRows, materialize
from megatron_omni.data.rows.mixture import Share
from megatron_omni.data.rows.plan import WINDOW_ROWS, Fill, Plan, PlanFingerprint, RowPlan
from megatron_omni.data.rows.saved import SavedPlan
from megatron_omni.data.rows.selection import LongSamples, Selection, select
from megatron_omni.data.rows.speed import Speeds
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.files import atomic_write
from megatron_omni.schema import RowShape


@dataclass(frozen=True)
class RowSettings:
    """All that rows depend on, beside the data set and the tokenizer."""

    geometry: EncoderGeometry
    shape: RowShape
    acoustic_delay: int
    seed: int
    long_samples: LongSamples = "refuse"
    mixture: MixtureConfig = MixtureConfig()
    window_rows: int = WINDOW_ROWS
    speeds: tuple[float, ...] = (1.0,)

    @classmethod
    def of(cls, recipe: Recipe) -> RowSettings:
        return cls(
            EncoderGeometry.of(recipe.model),
            recipe.row.shape,
            recipe.model.audio_head.acoustic_delay,
            recipe.run.seed,
            recipe.data.long_samples,
            recipe.data.mixture,
            speeds=recipe.data.augment.speed,
        )

    def fingerprint(self, samples: Samples, tokenizer: OmniTokenizer, mixture: str) -> PlanFingerprint:
        """``mixture`` is ``Mixture.fingerprint``, of the samples that are drawn."""
        row = (self.geometry, self.shape, self.acoustic_delay, self.seed, self.window_rows)
        return plan_fingerprint(samples, tokenizer, *row, mixture, self.long_samples, self.speeds)


@dataclass(frozen=True, eq=False)
class PlannedRows:
    selection: Selection
    plan: RowPlan
    """Of ``selection.samples``."""
    fingerprint: PlanFingerprint


def plan_rows(samples: Samples, tokenizer: OmniTokenizer, settings: RowSettings) -> PlannedRows:
    """Measures what was not measured yet, and plans; rows themselves are computed window by window, when they are asked for.

    Raises:
        InputError: a sample that no row holds, where ``long_samples`` keeps it; a mixture that does not suit the data; or
            speeds for split samples.
    """
    geometry, shape, delay = settings.geometry, settings.shape, settings.acoustic_delay
    demands = measure(samples, tokenizer, geometry, delay)
    selection = select(samples, demands, shape, tokenizer, geometry, delay, settings.long_samples, settings.mixture)
    perturbed = None
    if settings.speeds != (1.0,):
        if len(selection.split):
            raise InputError(
                "data.augment.speed changes lengths, which data.long_samples=split has split by; drop the long samples instead"
            )
        measured = [measure(samples, tokenizer, geometry, delay, speed=speed) for speed in settings.speeds]
        perturbed = Speeds(settings.speeds, tuple(one.table for one in measured))
        longest = max(one.longest_clip for one in (demands, *measured))
        selection = dataclasses.replace(selection, demands=dataclasses.replace(selection.demands, longest_clip=longest))
    plan = RowPlan(selection.demands.table, shape, settings.seed, settings.window_rows, selection.mixture, perturbed)
    fingerprint = settings.fingerprint(samples, tokenizer, selection.mixture.fingerprint)
    return PlannedRows(selection, plan, fingerprint)


@dataclass(frozen=True, eq=False)
class RowSource:
    """What training reads rows from, planned or packed before or not."""

    samples: Samples
    demands: Demands
    """Of ``samples``."""
    plan: Plan
    """Of ``samples``."""
    fingerprint: PlanFingerprint


def open_rows(train: Sequence[Path], tokenizer: OmniTokenizer, settings: RowSettings, plan: Path | None = None) -> RowSource:
    """The rows of the shards in ``train``, planned as they are needed; or, from the folder ``plan``, saved or packed ones.

    Packed rows need no other shards: ``train`` is not looked at, and they may be of any data and mixture.

    Raises:
        InputError: as ``plan_rows``; or ``plan`` was made under other settings.
    """
    if plan is not None and MaterializedRows.is_at(plan):
        rows = MaterializedRows(plan)
        rows.plan_fingerprint.require(settings.fingerprint(rows, tokenizer, rows.plan_fingerprint.mixture), str(plan))
        return RowSource(rows, rows.measured, rows, rows.plan_fingerprint)
    planned = plan_rows(ShardedDataset.open(train), tokenizer, settings)
    chosen = planned.plan if plan is None else SavedPlan.load(plan, planned.fingerprint, planned.plan)
    return RowSource(planned.selection.samples, planned.selection.demands, chosen, planned.fingerprint)


@dataclass(frozen=True)
class PackSummary:
    rows: int
    samples: int
    """Counted as often as they are drawn."""
    epochs: int
    windows: int
    fill: Fill
    mixture: list[Share]
    dropped: int
    """Samples left out because no row holds them."""
    split: int
    """Samples whose parts stand for them."""


def write_rows(planned: PlannedRows, epochs: range, out: Path, materialized: bool = False) -> PackSummary:
    """Writes the rows that the training stream makes of ``epochs``: as a plan, or as packed shards with their samples.

    The ids of samples that were dropped or split stand in ``long_samples.txt`` beside it, if there are any.
    """
    if materialized and planned.plan.perturbed is not None:
        raise InputError("data.augment.speed is drawn anew in every epoch, packed shards hold clips as they are: leave one of the two out")
    saved = SavedPlan.compute(planned.plan, epochs)
    selection = planned.selection
    if materialized:
        materialize(saved, selection.samples, selection.demands.longest_clip, planned.fingerprint, out)
    else:
        saved.save(out, planned.fingerprint)
    if long := [*selection.dropped.tolist(), *selection.split.tolist()]:
        atomic_write(out / "long_samples.txt", "".join(f"{selection.samples.sample(number).id}\n" for number in long))
    num_rows = len(saved.rows) - 1
    demand = np.zeros(saved.demands.shape[1], np.int64)
    for start in range(0, len(saved.samples), 1 << 20):  # a slice at a time: the table may be mapped and large
        demand += saved.demands[saved.samples[start : start + (1 << 20)]].sum(0, dtype=np.int64)
    return PackSummary(
        rows=num_rows,
        samples=len(saved.samples),
        epochs=len(epochs),
        windows=len(saved.windows) - 1,
        fill=Fill.of(demand, planned.plan.shape, num_rows),
        mixture=selection.mixture.shares(),
        dropped=len(selection.dropped),
        split=len(selection.split),
    )
