"""One epoch's row plan, computed, measured and saved: what ``tools/pack_sequences.py`` does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.data.rows.demands import Samples, measure, plan_fingerprint
from megatron_omni.data.rows.plan import Fill, RowPlan, require_fit
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.schema import RowShape


@dataclass(frozen=True)
class PackSummary:
    rows: int
    samples: int
    fill: Fill


def write_plan(
    samples: Samples,
    tokenizer: OmniTokenizer,
    geometry: EncoderGeometry,
    shape: RowShape,
    acoustic_delay: int,
    seed: int,
    epoch: int,
    out: Path,
) -> PackSummary:
    """Plans the rows that the training stream makes of this epoch and saves them in ``out`` (``EpochPlan.load``).

    Raises:
        InputError: a sample that no row holds.
    """
    table = measure(samples, tokenizer, geometry, acoustic_delay).table
    require_fit(table, shape, lambda number: samples.sample(number).id)
    plan = RowPlan(table, shape, seed).epoch(epoch)
    plan.save(out, plan_fingerprint(samples, tokenizer, geometry, shape, acoustic_delay, seed), epoch)
    num_rows = len(plan.rows) - 1
    return PackSummary(num_rows, len(plan.samples), Fill.of(table.sum(0), shape, num_rows))
