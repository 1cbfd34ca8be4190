"""The rows of a data set under one recipe: measured, selected and planned; what training starts from and
``tools/pack_sequences.py`` writes down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.config.recipe import MixtureConfig, Recipe
from megatron_omni.data.rows.demands import Samples, measure, plan_fingerprint
from megatron_omni.data.rows.materialize import materialize
from megatron_omni.data.rows.mixture import Share
from megatron_omni.data.rows.plan import WINDOW_ROWS, Fill, PlanFingerprint, RowPlan
from megatron_omni.data.rows.saved import SavedPlan
from megatron_omni.data.rows.selection import LongSamples, Selection, select
from megatron_omni.data.tokenizer import OmniTokenizer
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

    @classmethod
    def of(cls, recipe: Recipe) -> RowSettings:
        return cls(
            EncoderGeometry.of(recipe.model),
            recipe.row.shape,
            recipe.model.audio_head.acoustic_delay,
            recipe.run.seed,
            recipe.data.long_samples,
            recipe.data.mixture,
        )


@dataclass(frozen=True, eq=False)
class PlannedRows:
    selection: Selection
    plan: RowPlan
    """Of ``selection.samples``."""
    fingerprint: PlanFingerprint


def plan_rows(samples: Samples, tokenizer: OmniTokenizer, settings: RowSettings) -> PlannedRows:
    """Measures what was not measured yet, and plans; rows themselves are computed window by window, when they are asked for.

    Raises:
        InputError: a sample that no row holds, where ``long_samples`` keeps it; or a mixture that does not suit the data.
    """
    geometry, shape, delay = settings.geometry, settings.shape, settings.acoustic_delay
    demands = measure(samples, tokenizer, geometry, delay)
    selection = select(samples, demands, shape, tokenizer, geometry, delay, settings.long_samples, settings.mixture)
    plan = RowPlan(selection.demands.table, shape, settings.seed, settings.window_rows, selection.mixture)
    fingerprint = plan_fingerprint(
        samples,
        tokenizer,
        geometry,
        shape,
        delay,
        settings.seed,
        settings.window_rows,
        selection.mixture.fingerprint,
        settings.long_samples,
    )
    return PlannedRows(selection, plan, fingerprint)


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
    """Writes the rows that the training stream makes of ``epochs``: as a plan, or as packed shards with their samples."""
    saved = SavedPlan.compute(planned.plan, epochs)
    selection = planned.selection
    if materialized:
        materialize(saved, selection.samples, selection.demands.longest_clip, planned.fingerprint, out)
    else:
        saved.save(out, planned.fingerprint)
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
