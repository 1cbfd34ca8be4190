"""Speed perturbation: lengths are what the plan counts with, packing stays exact, and every world draws the same speeds."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest

from megatron_omni.audio.features import LogMel
from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.config.recipe import MixtureConfig
from megatron_omni.data.rows.demands import measure_one
from megatron_omni.data.rows.pack import PlannedRows, RowSettings, plan_rows, write_rows
from megatron_omni.data.rows.packer import RowPacker
from megatron_omni.data.rows.plan import capacity
from megatron_omni.data.rows.saved import SavedPlan
from megatron_omni.data.rows.speed import at_speed, change_speed, sped_length
from megatron_omni.data.rows.stream import RowStream
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.runtime.errors import InputError
from megatron_omni.schema import RowShape

FACTORS = (0.9, 1.0, 1.1)
SHAPE = RowShape(seq=160, codec=96, encoder=320, spoken=64, supervised=128)


@pytest.fixture(scope="module")
def settings(geometry: EncoderGeometry) -> RowSettings:
    return RowSettings(geometry, SHAPE, 1, 0, mixture=MixtureConfig(), window_rows=4, speeds=FACTORS)


@pytest.fixture(scope="module")
def planned(memory_samples, tokenizer: OmniTokenizer, settings: RowSettings, tmp_path_factory: pytest.TempPathFactory) -> PlannedRows:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return plan_rows(memory_samples(90), tokenizer, settings)


@pytest.mark.parametrize("factor", [0.8, 0.9, 1.0, 1.1, 1.37])
def test_a_clip_has_the_planned_length_and_the_scaled_pitch(factor: float) -> None:
    for size in (*range(1, 40), 999, 16_000, 16_001, 47_117):
        assert change_speed(np.ones(size, np.float32), factor).shape == (sped_length(size, factor),)
    tone = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000).astype(np.float32)
    sped = change_speed(tone, factor)
    assert sped.dtype == np.float32
    peak = np.abs(np.fft.rfft(sped)).argmax() / len(sped) * 16_000
    assert peak == pytest.approx(1000 * factor, rel=2e-3)


def test_demands_are_those_of_the_played_samples(planned: PlannedRows, tokenizer: OmniTokenizer, settings: RowSettings) -> None:
    numbers = np.arange(90)
    seen = Counter()
    for ordinal in range(3):
        played = planned.plan.played(ordinal, numbers)
        assert (played.demands <= capacity(SHAPE)).all()
        seen.update(played.speeds.tolist())
        for number, demand, speed in zip(numbers.tolist(), played.demands, played.speeds.tolist(), strict=True):
            sample = at_speed(planned.selection.samples.sample(number), speed)
            assert demand.tolist() == measure_one(sample, tokenizer, settings.geometry, 1).tolist()
    assert set(seen) == set(FACTORS) and min(seen.values()) > 60
    assert (planned.plan.played(0, numbers).speeds != planned.plan.played(1, numbers).speeds).any()


def test_rows_hold_what_they_play(planned: PlannedRows, tokenizer: OmniTokenizer, geometry: EncoderGeometry, log_mel: LogMel) -> None:
    """No row overflows, fills are exact, and the batches are the same on two ranks as on one."""
    samples = planned.selection.samples
    packer = RowPacker(samples, tokenizer, geometry, log_mel, samples.codec, SHAPE, 1)

    def steps(rank: int, size: int) -> RowStream:
        places = dict(virtual_streams=2, dp_rank=rank, dp_size=size, micro_rows=2 // size, micro_batches=1)
        return RowStream(packer, planned.plan, planned.fingerprint, **places)

    assert planned.plan.windows_per_epoch > 2
    alone = list(itertools.islice(steps(0, 1), 12))
    halves = [list(itertools.islice(steps(rank, 2), 12)) for rank in range(2)]
    for whole, *parts in zip(alone, *halves, strict=True):
        (packed,) = whole.micro_batches
        tokens = int((packed.batch.segments_BT >= 0).sum())
        assert whole.fill.tokens == pytest.approx(tokens / (2 * SHAPE.seq))
        for row, part in enumerate(parts):
            assert part.micro_batches[0].keys[0] == packed.keys[row]
            assert (part.micro_batches[0].batch.mel_RAM[0] == packed.batch.mel_RAM[row]).all()
    heard = sum(int(step.micro_batches[0].batch.mel_valid_RA.sum()) for step in alone)
    plain = dataclasses.replace(planned.plan, perturbed=None)
    assert planned.plan.window(0)[0].tolist() != plain.window(0)[0].tolist()
    assert heard > 0


def test_what_speeds_cannot_go_with(
    planned: PlannedRows, settings: RowSettings, memory_samples, tokenizer: OmniTokenizer, tmp_path
) -> None:
    with pytest.raises(InputError, match=r"packed shards hold clips as they are"):
        write_rows(planned, range(1), tmp_path / "rows", materialized=True)
    other = dataclasses.replace(settings, speeds=(1.0,)).fingerprint(planned.selection.samples, tokenizer, "")
    SavedPlan.compute(planned.plan, range(1)).save(tmp_path / "plan", planned.fingerprint)
    with pytest.raises(InputError, match=r"speeds: 0\.9 1\.0 1\.1 there, 1\.0 now"):
        SavedPlan.load(tmp_path / "plan", other, planned.plan)
    saved = SavedPlan.load(tmp_path / "plan", planned.fingerprint, planned.plan)
    assert [row.tolist() for row in saved.window(0)] == [row.tolist() for row in planned.plan.window(0)]
