"""Uneven layouts: a handful of samples for many ranks, rows that lack audio or speech or everything.

Every rank must run the same collectives on the same shapes, or training hangs; evaluation must see each sample once.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_omni.audio.features import LogMel
from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.config.load import load_recipe
from megatron_omni.config.model import CodecConfig
from megatron_omni.data.rows.demands import Demands, measure_one
from megatron_omni.data.rows.packer import RowPacker
from megatron_omni.data.rows.plan import PlanFingerprint, RowPlan
from megatron_omni.data.rows.stream import RowStream, evaluation_batches
from megatron_omni.engine.engine import OmniEngine
from megatron_omni.parallel.topology import ParallelGroups, Topology
from megatron_omni.runtime.seeds import rng
from megatron_omni.schema import Message, Part, Sample, SampleArrays
from tests.factories import CODEC, SHAPE, WORDS, model_config, tokenizer
from tests.harness import run_ranks

LAYOUTS = range(50)
V = 12
KINDS = ("text", "heard", "spoken", "codes only", "all")
CONFIG = model_config(acoustic_delay=1)


@dataclass(frozen=True)
class Uneven:
    """Samples of a few kinds only, down to a single one."""

    seed: int
    codec: CodecConfig | None = CODEC

    @property
    def fingerprint(self) -> str:
        return f"uneven-{self.seed}"

    def __len__(self) -> int:
        return int(rng("layout", self.seed).integers(1, 30 if self.seed % 2 else 6))

    def kind(self, number: int) -> str:
        kinds = rng("kinds", self.seed).permutation(KINDS)[: 1 + self.seed % 3]
        return str(rng("kind", self.seed, number).choice(kinds))

    def sample(self, number: int, /) -> Sample:
        random, kind = rng("sample", self.seed, number), self.kind(number)
        heard, spoken = kind in ("heard", "all"), kind in ("spoken", "codes only", "all")
        answer = [] if kind == "codes only" else [Part("text", " ".join(random.choice(WORDS, random.integers(1, 5))))]
        answer += [Part("codes", "codes0")] if spoken else []
        question = Part("audio", "audio0") if heard else Part("text", "three")
        messages = (Message("user", (question,)), Message("assistant", tuple(answer)))
        lengths = {"audio0": int(random.integers(100, 6400))} if heard else {}
        frames = {"codes0": int(random.integers(0, 9))} if spoken else {}
        return Sample(f"s{number}", "converse", "", messages, lengths, frames)

    def arrays(self, number: int, /) -> SampleArrays:
        sample, random = self.sample(number), rng("arrays", self.seed, number)
        return SampleArrays(
            {name: 0.1 * random.standard_normal(size).astype(np.float32) for name, size in sample.num_samples.items()},
            {name: random.integers(0, CODEC.card, (4, size)).astype(np.uint16) for name, size in sample.num_frames.items()},
        )


def parts_of(layout: int, tensor: int = 1) -> tuple[RowPacker, Demands]:
    samples, geometry = Uneven(layout), EncoderGeometry.of(CONFIG)
    table = np.array([measure_one(samples.sample(number), tokenizer(), geometry, 1) for number in range(len(samples))])
    demands = Demands(table, longest_clip=64)
    return RowPacker(samples, tokenizer(), geometry, LogMel(CONFIG.features), CODEC, SHAPE, 1, tensor, 64), demands


def stream_of(packer: RowPacker, demands: Demands, rank: int, size: int, micro_rows: int, micro_batches: int) -> RowStream:
    plan, fingerprint = RowPlan(demands.table, SHAPE, 0), PlanFingerprint("uneven", "", "", "", 1, 0, 512)
    places = dict(virtual_streams=V, dp_rank=rank, dp_size=size, micro_rows=micro_rows, micro_batches=micro_batches)
    return RowStream(packer, plan, fingerprint, **places)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_gets_as_much_and_evaluation_sees_each_sample_once(layout: int) -> None:
    random = rng("ranks", layout)
    size, tensor = int(random.choice([1, 2, 3, 4, 6])), int(random.choice([1, 2]))
    packer, demands = parts_of(layout, tensor)
    everyone = Counter(f"s{number}" for number in range(len(demands.table)))
    ranks = [list(evaluation_batches(packer, demands, dp_rank=rank, dp_size=size, micro_rows=2)) for rank in range(size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert Counter(key for batches in ranks for packed in batches for row in packed.keys for key in row) == everyone
    shapes = {tuple(tensor.shape for tensor in vars(packed.batch).values()) for batches in ranks for packed in batches}
    steps = [list(itertools.islice(stream_of(packer, demands, rank, size, 1, 2), 2)) for rank in range(size)]
    assert {len(own) for own in steps} == {2}
    shapes_of_steps = {
        tuple(tensor.shape for tensor in vars(packed.batch).values()) for own in steps for step in own for packed in step.micro_batches
    }
    assert len(shapes) == 1 and len(shapes_of_steps) == 1
    numbers = [number for own in steps for step in own for number in step.row_numbers]
    assert sorted(numbers) == list(range(4 * size))


def train_on(folder: str, layouts: list[int]) -> list[tuple[float, int]]:
    """One rank of a ZeRO-3 world: two steps and one evaluation of each layout, one after another."""
    rank, size = dist.get_rank(), dist.get_world_size()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    recipe = load_recipe(Path(folder, "recipe.yaml"), [f"engine.deepspeed={folder}/zero3.json"])
    engine = OmniEngine(recipe, CONFIG, ParallelGroups(Topology(size, 1, rank)), torch.device("cpu"))
    results = []
    for layout in layouts:
        packer, demands = parts_of(layout)
        losses = [
            engine.step(number, [packed.batch for packed in step.micro_batches], 1e-3).loss
            for number, step in enumerate(itertools.islice(stream_of(packer, demands, rank, size, 1, 2), 2))
        ]
        batches = list(evaluation_batches(packer, demands, dp_rank=rank, dp_size=size, micro_rows=1))
        engine.evaluate([packed.batch for packed in batches])
        results.append((losses[-1], sum(len(row) for packed in batches for row in packed.keys)))
    return results


@pytest.mark.parametrize("layouts", [LAYOUTS[:3], pytest.param(LAYOUTS, marks=pytest.mark.slow)], ids=["some", "all"])
def test_no_rank_waits_for_another(layouts: range, tmp_path: Path) -> None:
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = {"stage": 3, "stage3_param_persistence_threshold": 100}
    (tmp_path / "zero3.json").write_text(json.dumps({key: "auto" for key in auto} | {"zero_optimization": zero, "steps_per_print": 10**9}))
    recipe = {
        "run": {"dir": str(tmp_path / "run"), "wandb": {"mode": "disabled"}},
        "model": CONFIG.model_dump(mode="json"),
        "data": {"train": ["none"], "tokenizer": "none"},
        "row": vars(SHAPE),
        "batch": {"global_rows": 6},
        "optim": {"lr": 1e-3},
        "train": {"steps": 2},
        "engine": {"deepspeed": "", "dtype": "fp32"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    ranks = run_ranks(train_on, 3, str(tmp_path), list(layouts), timeout=280)
    for layout, *of_ranks in zip(layouts, *ranks, strict=True):
        assert len({loss for loss, _ in of_ranks}) == 1 and np.isfinite(of_ranks[0][0])
        assert sum(count for _, count in of_ranks) == len(Uneven(layout))
