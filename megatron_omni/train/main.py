"""Starts or continues the run that a recipe describes; every rank calls ``main``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from megatron_omni.audio.features import LogMel
from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.checkpoint.comm import Distributed
from megatron_omni.checkpoint.load import Checkpoint
from megatron_omni.checkpoint.save import checkpoints
from megatron_omni.config.load import dump_recipe, load_recipe
from megatron_omni.config.model import ModelConfig
from megatron_omni.config.recipe import Recipe
from megatron_omni.data.rows.augment import Augmentation
from megatron_omni.data.rows.demands import Samples
from megatron_omni.data.rows.pack import RowSettings, open_rows
from megatron_omni.data.rows.packer import RowPacker
from megatron_omni.data.rows.stream import RowStream, StreamState
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.engine import zero_state
from megatron_omni.engine.engine import OmniEngine
from megatron_omni.parallel.topology import ParallelGroups, Topology
from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.logs import get_logger, log_to
from megatron_omni.runtime.run_directory import RunDirectory
from megatron_omni.runtime.world import World
from megatron_omni.train.loop import Trainer

logger = get_logger(__name__)


@dataclass(frozen=True)
class TrainSummary:
    """What a finished run prints."""

    run: str
    steps: int
    loss: float


def main(config: Path, overrides: Sequence[str] = ()) -> TrainSummary:
    """Trains to ``train.steps``; an existing run in ``run.dir`` goes on from its newest good checkpoint.

    Raises ``InputError`` for a recipe, data or tokenizer that do not fit each other or the ranks that were started.
    """
    recipe = load_recipe(config, overrides)
    world = World.from_environment()
    device = start_ranks(world)
    try:
        return train(recipe, world, device)
    finally:
        dist.destroy_process_group()


def start_ranks(world: World) -> torch.device:
    """The default process group: NCCL with GPUs, gloo without."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        torch.cuda.set_device(world.local_rank)
        deepspeed.init_distributed("nccl", auto_mpi_discovery=False)
        return torch.device("cuda", world.local_rank)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # a plain process is a world of one
    os.environ.setdefault("MASTER_PORT", "0")
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, rank=world.rank, world_size=world.size)
    return torch.device("cpu")


def train(recipe: Recipe, world: World, device: torch.device) -> TrainSummary:
    dp_size = recipe.data_parallel(world.size)
    log_to(RunDirectory(recipe.run.dir).logs)
    groups = ParallelGroups(Topology(world.size, recipe.parallel.tensor, world.rank))
    comm = Distributed()
    tokenizer = OmniTokenizer.load(recipe.data.tokenizer)
    rows = open_rows(recipe.data.train, tokenizer, RowSettings.of(recipe), recipe.data.plan)
    model_config = resolve_model(recipe.model, rows.samples, tokenizer)
    recipe = recipe.model_copy(update={"model": model_config})
    engine = OmniEngine(recipe, model_config, groups, device)

    checkpoint = restore(engine, recipe.run.dir, comm)
    start_step = checkpoint.state.step if checkpoint else 0
    assert model_config.codec is not None
    packer = RowPacker(
        rows.samples,
        tokenizer,
        EncoderGeometry.of(model_config),
        LogMel(model_config.features),
        model_config.codec,
        recipe.row.shape,
        model_config.audio_head.acoustic_delay,
        groups.topology.tensor,
        rows.demands.longest_clip,
        Augmentation(recipe.data.augment, model_config.features, recipe.run.seed) if recipe.data.augment.keeps_lengths else None,
        skip_damaged=True,
    )
    stream = RowStream(
        packer,
        rows.plan,
        rows.fingerprint,
        virtual_streams=recipe.data.virtual_streams,
        dp_rank=groups.topology.data_rank,
        dp_size=dp_size,
        micro_rows=recipe.batch.micro_rows,
        micro_batches=recipe.accumulation(dp_size),
        num_workers=recipe.data.num_workers,
        state=None if checkpoint is None else StreamState.from_json(checkpoint.state.data),  # type: ignore[arg-type]
        damaged_samples=recipe.data.damaged_samples,
        pinned=device.type == "cuda",
    )
    if world.is_first:
        RunDirectory(recipe.run.dir).describe(dump_recipe(recipe), world.size)
    comm.barrier()
    fingerprints = {"tokenizer": tokenizer.fingerprint, "data": rows.samples.fingerprint}
    with Trainer(engine, stream, comm, fingerprints, start_step, checkpoint) as trainer:
        report = trainer.run()
    return TrainSummary(str(recipe.run.dir), recipe.train.steps, report.loss if report else float("nan"))


def restore(engine: OmniEngine, run: Path, comm: Distributed) -> Checkpoint | None:
    """Fills the engine from the newest good checkpoint of ``run``; None (a fresh run) where it has none."""
    if not comm.broadcast(bool(checkpoints(run))):
        return None
    checkpoint = zero_state.restore(engine.deepspeed, run, comm)
    logger.info("continuing from %s", checkpoint.path)
    return checkpoint


def resolve_model(config: ModelConfig, samples: Samples, tokenizer: OmniTokenizer) -> ModelConfig:
    """Fills in what the data decide: the codec and the vocabulary.

    Raises ``InputError`` where the recipe says otherwise.
    """
    codec = samples.codec
    if codec is None:
        raise InputError("the training shards hold no codec provenance: build them with tools/make_shards.py --codec")
    if config.codec is not None and config.codec != codec:
        raise InputError(f"model.codec={config.codec} is not the shards' codec {codec}; leave model.codec out")
    vocab_size = config.llm.vocab_size or tokenizer.padded_vocab_size
    if vocab_size != tokenizer.padded_vocab_size:
        raise InputError(
            f"model.llm.vocab_size={vocab_size} is not the tokenizer's padded size {tokenizer.padded_vocab_size}; leave it out, or 0"
        )
    return config.model_copy(update={"codec": codec, "llm": config.llm.model_copy(update={"vocab_size": vocab_size})})
