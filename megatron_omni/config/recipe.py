"""A run, described whole: the recipe that ``launch/recipes/*.yaml`` hold and that ``RUN/config.yaml`` records.

One section per concern; a field's description gives its meaning and unit. Reading, overrides and messages: ``load``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_omni.config.model import ModelConfig, Strict
from megatron_omni.runtime.errors import InputError
from megatron_omni.schema import RowShape, Task


class WandbConfig(Strict):
    mode: Literal["offline", "online", "disabled"] = Field("offline", description="offline writes under RUN/wandb, for `wandb sync`")
    project: str = "megatron_omni"
    name: str | None = Field(None, description="null: the name of the run directory")


class RunConfig(Strict):
    dir: Path = Field(description="the run directory; an existing run there is continued")
    seed: int = Field(0, ge=0, description="of weights, data order and dropout")
    wandb: WandbConfig = WandbConfig()


class MixtureConfig(Strict):
    """How much of each data set and task an epoch holds; by default every sample once (``data.rows.mixture``)."""

    by: Literal["epochs", "tokens"] = Field(
        "epochs", description="what amounts count: passes over the samples, or LLM positions, of which only the ratios matter"
    )
    datasets: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="amount by data set, as data.train names it; 1 where none is given, 0 leaves it out"
    )
    tasks: dict[Task, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="factor on a task's part of every data set; 1 where none is given, 0 leaves it out"
    )
    temperature: float = Field(1.0, gt=0, description="amounts of LLM positions are raised to one over it: above 1 it evens them out")


class AugmentConfig(Strict):
    """How clips are distorted in training, anew each time one is heard (``data.rows.augment``); by default not at all."""

    frequency_warp: float = Field(0.0, ge=0, lt=0.5, description="frequencies are scaled by 1 +- up to this: other vocal tracts")
    frequency_masks: int = Field(0, ge=0, description="bands of the log-mel that are masked (SpecAugment)")
    frequency_mask_width: float = Field(0.15, ge=0, le=1, description="largest width of one, as part of the mel bins")
    time_masks: int = Field(0, ge=0, description="stretches of the log-mel that are masked (SpecAugment)")
    time_mask_width: float = Field(0.05, ge=0, le=1, description="largest length of one, as part of the clip")
    speed: tuple[Annotated[float, Field(gt=0.5, lt=2)], ...] = Field(
        (1.0,), min_length=1, description="clips are played at one of these speeds, such as [0.9, 1.0, 1.1]; the row plan knows which"
    )
    gain_db: float = Field(0.0, ge=0, description="dB: made louder or softer by up to this")
    noise: Path | None = Field(None, description="folder of recordings, mixed into clips")
    noise_probability: float = Field(0.5, ge=0, le=1, description="part of the clips that get noise")
    noise_snr_db: tuple[float, float] = Field((5.0, 25.0), description="dB: range of the signal-to-noise ratio")

    @property
    def keeps_lengths(self) -> bool:
        """Whether anything is done to clips once their lengths are fixed."""
        return bool(self.frequency_warp or self.frequency_masks or self.time_masks or self.gain_db or self.noise)


class DataConfig(Strict):
    train: tuple[Path, ...] = Field(min_length=1, description="shard folders, read as one data set")
    tokenizer: Path = Field(description="folder written by tools/prepare_tokenizer.py")
    mixture: MixtureConfig = MixtureConfig()
    long_samples: Literal["refuse", "drop", "split"] = Field(
        "refuse", description="those that no row holds: refuse them, leave them out, or split them between exchanges of a conversation"
    )
    plan: Path | None = Field(None, description="folder written by tools/pack_sequences.py; null: rows are planned as they are needed")
    augment: AugmentConfig = AugmentConfig()
    virtual_streams: int = Field(64, ge=1, description="independent streams of rows; data-parallel sizes divide it; it fixes the order")
    damaged_samples: float = Field(
        0.001, ge=0, le=1, description="largest share of samples that may turn out unreadable and are left out; beyond it the run ends"
    )
    num_workers: int = Field(1, ge=0, description="processes per rank that read shards and pack rows; 0: in the rank itself")


class RowConfig(Strict):
    """Fixed capacities of a training row (``schema.RowShape``)."""

    seq: int = Field(gt=0, description="LLM positions (L)")
    codec: int = Field(gt=0, description="codec-decoder positions (F)")
    encoder: int = Field(gt=0, description="encoder frames (A)")
    spoken: int = Field(gt=0, description="spoken-text positions of the Pre-NN (S)")
    supervised: int = Field(gt=0, multiple_of=128, description="supervised text positions (U), a multiple of 128")

    @property
    def shape(self) -> RowShape:
        return RowShape(self.seq, self.codec, self.encoder, self.spoken, self.supervised)


class BatchConfig(Strict):
    global_rows: int = Field(gt=0, description="rows of one optimizer step, over all ranks")
    micro_rows: int = Field(1, gt=0, description="rows that one rank runs at a time")


class ParallelConfig(Strict):
    tensor: int = Field(1, gt=0, description="tensor-parallel size; the data-parallel size is the rest of the world")


class OptimConfig(Strict):
    """AdamW; the learning rate warms up linearly, holds, then falls linearly (``train.schedule``)."""

    lr: float = Field(gt=0, description="peak learning rate")
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    warmup_steps: int = Field(100, ge=0, description="steps")
    hold_fraction: float = Field(0.3, ge=0, le=1, description="part of train.steps after which the fall begins")
    final_fraction: float = Field(0.0, ge=0, le=1, description="part of lr that is left at the end")


class LossConfig(Strict):
    """loss = text_weight * text + sum over codebooks of codec_weights[k] * codec[k], each a mean over the global batch."""

    text_weight: float = Field(1.0, ge=0)
    codec_weights: float | tuple[float, ...] = Field(1.0, description="one weight for every codebook, or a list of one per codebook")
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    z_loss: float = Field(0.0, ge=0, description="weight of the squared log partition")

    def weights(self, num_codebooks: int) -> tuple[float, ...]:
        """One weight per codebook; ``InputError`` if the list has another length."""
        if isinstance(self.codec_weights, float):
            return (self.codec_weights,) * num_codebooks
        if len(self.codec_weights) != num_codebooks:
            raise InputError(
                f"loss.codec_weights has {len(self.codec_weights)} entries, the data's codec has {num_codebooks} codebooks; "
                "give one number, or one per codebook"
            )
        return self.codec_weights


class TrainConfig(Strict):
    steps: int = Field(gt=0, description="optimizer steps of the whole run")
    log_every: int = Field(10, gt=0, description="steps")
    save_every: int = Field(500, gt=0, description="steps")
    keep_last: int = Field(2, gt=0, description="checkpoints kept")
    frozen: tuple[str, ...] = Field((), description="shell patterns of parameter names that do not train, such as encoder.*")


class EngineConfig(Strict):
    deepspeed: Path = Field(description="DeepSpeed JSON, such as ds_configs/zero3.json; its auto values come from this recipe")
    dtype: Literal["fp32", "bf16"] = Field("bf16", description="of weights and activations; masters and moments are fp32")


class Recipe(Strict):
    run: RunConfig
    model: ModelConfig
    data: DataConfig
    row: RowConfig
    batch: BatchConfig
    parallel: ParallelConfig = ParallelConfig()
    optim: OptimConfig
    loss: LossConfig = LossConfig()
    train: TrainConfig
    engine: EngineConfig

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        tensor, head = self.parallel.tensor, self.model.audio_head
        cut = {"model.llm.stack": self.model.llm.stack, "model.audio_head.pre_nn": head.pre_nn, "model.audio_head.decoder": head.decoder}
        widths = {
            f"{stack}.{name}": value
            for stack, config in cut.items()
            for name, value in (
                ("num_heads", config.num_heads),
                ("num_kv_heads", config.kv_heads),
                ("intermediate_size", config.intermediate_size),
            )
        }
        # the steps of a micro-batch are dealt out over the group, and the vocabulary is padded to a multiple of 128
        widths |= {"batch.micro_rows x row.codec": self.batch.micro_rows * self.row.codec, "the vocabulary's padding": 128}
        choices = _alternatives(_divisors(math.gcd(*widths.values())))
        for name, value in widths.items():
            if value % tensor:
                raise ValueError(f"parallel.tensor={tensor} does not divide {name}={value}; choose {choices}")
        if self.batch.global_rows % self.batch.micro_rows:
            raise ValueError(
                f"batch.micro_rows={self.batch.micro_rows} does not divide batch.global_rows={self.batch.global_rows}; "
                f"choose {_alternatives(_divisors(self.batch.global_rows))}"
            )
        return self

    def data_parallel(self, world_size: int) -> int:
        """Data-parallel size in a world of ``world_size`` ranks; ``InputError`` if the recipe does not fit it."""
        tensor, streams = self.parallel.tensor, self.data.virtual_streams
        if world_size % tensor:
            raise InputError(
                f"parallel.tensor={tensor} does not divide the {world_size} ranks that were started; "
                f"choose {_alternatives(_divisors(world_size))}, or start a multiple of {tensor} ranks"
            )
        dp_size = world_size // tensor
        if streams % dp_size:
            raise InputError(
                f"data.virtual_streams={streams} cannot be shared by {dp_size} data-parallel ranks ({world_size} ranks / "
                f"parallel.tensor={tensor}); start {_alternatives(_divisors(streams))} of them, or begin a new run with other streams"
            )
        self.accumulation(dp_size)
        return dp_size

    def accumulation(self, dp_size: int) -> int:
        """Micro-batches per step and rank: ``global_rows = micro_rows x accumulation x dp_size``."""
        rows, micro = self.batch.global_rows, self.batch.micro_rows
        if rows % (micro * dp_size):
            raise InputError(
                f"batch.global_rows={rows} is not batch.micro_rows={micro} x accumulation x {dp_size} data-parallel ranks; "
                f"choose batch.global_rows as a multiple of {micro * dp_size}, or another batch.micro_rows"
            )
        return rows // (micro * dp_size)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _alternatives(values: list[int]) -> str:
    """``1, 2, 4 or 8``."""
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
