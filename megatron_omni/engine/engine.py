"""The training engine: an ``OmniModel`` under DeepSpeed ZeRO, with our tensor parallelism as its ``mpu``.

What DeepSpeed leaves to the caller is done here, once:

- weights are created sharded (``zero.Init`` over the data-parallel group) and filled tensor by tensor;
- losses are scaled by the counts of the whole global batch, so a step is one mean, never a mean of means;
- gradients of weights that are replicated in the tensor-parallel group but see only part of the rows are summed over
  it, on the reduced partitions, before norm and clipping;
- dropout is seeded per (seed, step, micro-batch, data-parallel rank), so a resumed run draws the same masks and
  tensor-parallel peers draw equal ones.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist

from megatron_omni.config.load import deepspeed_config
from megatron_omni.config.model import ModelConfig
from megatron_omni.config.recipe import Recipe
from megatron_omni.engine import zero_state
from megatron_omni.engine.weights import fill
from megatron_omni.kernels.losses import LossOptions
from megatron_omni.model.init import initial_value
from megatron_omni.model.omni import OmniModel
from megatron_omni.parallel.topology import ParallelGroups
from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.seeds import stable_seed
from megatron_omni.schema import Batch, Counts, LossScale, StepLosses


class StepResult(NamedTuple):
    """One optimizer step, over the whole global batch."""

    loss: float
    text_loss: float
    text_accuracy: float
    codec_loss: tuple[float, ...]
    codec_accuracy: tuple[float, ...]
    counts: Counts
    grad_norm: float


class OmniEngine:
    """Owns the DeepSpeed engine of one rank. ``model_config`` is resolved: codec and vocabulary are known."""

    def __init__(self, recipe: Recipe, model_config: ModelConfig, groups: ParallelGroups, device: torch.device) -> None:
        self.recipe = recipe
        self.model_config = model_config
        self.groups = groups
        self.device = device
        topology = groups.topology
        assert model_config.codec is not None, "resolve the configuration first"
        self.codec_weights = recipe.loss.weights(model_config.codec.num_codebooks)
        config = deepspeed_config(recipe, topology.data)
        self.stage = config.get("zero_optimization", {}).get("stage", 0)
        options = LossOptions(label_smoothing=recipe.loss.label_smoothing, z_loss=recipe.loss.z_loss)
        with self._created_sharded(config):
            model = OmniModel(model_config, groups.tensor_parallel, options)
        fill(model, lambda name, layout: initial_value(name, layout, model_config, recipe.run.seed))
        freeze(model, recipe.train.frozen)
        self.partial = [name for name, p in model.named_parameters() if p.requires_grad and getattr(p, "sum_over_tensor_parallel", False)]
        optimizer = torch.optim.AdamW(
            parameter_groups(model, recipe.optim.weight_decay), lr=recipe.optim.lr, betas=recipe.optim.betas, eps=recipe.optim.eps
        )
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=groups, dist_init_required=False)
        zero_state.check(self.deepspeed)

    def _created_sharded(self, config: dict[str, Any]) -> AbstractContextManager[Any]:
        """Under ZeRO-3 parameters are cut as they are made."""
        if self.stage != 3:
            return nullcontext()
        # the mpu alone would have it cut over the whole world
        group = self.groups.get_data_parallel_group()
        return deepspeed.zero.Init(data_parallel_group=group, config_dict_or_path=config, mpu=self.groups)

    @property
    def model(self) -> OmniModel:
        return self.deepspeed.module

    def set_lr(self, lr: float) -> None:
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr

    def step(self, step: int, batches: Sequence[Batch], lr: float) -> StepResult:
        """One optimizer step over the global batch; ``batches`` are this rank's micro-batches, one per accumulation."""
        engine, data_rank = self.deepspeed, self.groups.topology.data_rank
        engine.train()
        self.set_lr(lr)
        counts = self._global_counts(batches)
        scale = LossScale.of(counts, self.recipe.loss.text_weight, self.codec_weights, self.groups.topology.data * len(batches))
        sums: list[torch.Tensor] = []
        grad_norm = 0.0
        for index, batch in enumerate(batches):
            torch.manual_seed(stable_seed(self.recipe.run.seed, "dropout", step, index, data_rank))
            losses: StepLosses = engine(batch.to(self.device), scale)
            engine.backward(losses.loss)
            sums.append(_flatten(losses))
            if index == len(batches) - 1:
                if self.groups.topology.tensor > 1:
                    zero_state.sum_gradients_over_tensor_parallel(engine, self.groups.get_model_parallel_group(), self.partial)
                if self.stage == 0:
                    grad_norm = zero_state.grad_norm(engine)
            engine.step()
        if self.stage:
            grad_norm = float(engine.get_global_grad_norm())
        return self._result(torch.stack(sums).sum(0), counts, grad_norm)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> StepResult:
        """Losses of held-out batches; every rank must bring as many as the others."""
        self.deepspeed.eval()
        counts = self._global_counts(batches)
        scale = LossScale(0.0, (0.0,) * len(self.codec_weights))
        sums = torch.stack([_flatten(self.deepspeed(batch.to(self.device), scale)) for batch in batches]).sum(0)
        return self._result(sums, counts, math.nan)

    def _global_counts(self, batches: Sequence[Batch]) -> Counts:
        local = [Counts.of(batch) for batch in batches]
        total = torch.tensor([[count.text, *count.codec] for count in local], device=self.device).sum(0)
        dist.all_reduce(total, group=self.groups.get_data_parallel_group())
        text, *codec = total.tolist()
        return Counts(text, tuple(codec))

    def _result(self, sums: torch.Tensor, counts: Counts, grad_norm: float) -> StepResult:
        dist.all_reduce(sums, group=self.groups.get_data_parallel_group())
        text_sum, text_correct, *codec = sums.tolist()
        K = len(counts.codec)
        codec_loss = tuple(total / max(n, 1) for total, n in zip(codec[:K], counts.codec, strict=True))
        text_loss = text_sum / max(counts.text, 1)
        loss = self.recipe.loss.text_weight * text_loss + sum(w * x for w, x in zip(self.codec_weights, codec_loss, strict=True))
        return StepResult(
            loss=loss,
            text_loss=text_loss,
            text_accuracy=text_correct / max(counts.text, 1),
            codec_loss=codec_loss,
            codec_accuracy=tuple(right / max(n, 1) for right, n in zip(codec[K:], counts.codec, strict=True)),
            counts=counts,
            grad_norm=grad_norm,
        )


def _flatten(losses: StepLosses) -> torch.Tensor:
    """[text sum, text correct, codec sums..., codec correct...] in float64, so that counts stay exact."""
    parts = [losses.text_sum[None], losses.text_correct[None], losses.codec_sum_K, losses.codec_correct_K]
    return torch.cat([part.detach().double() for part in parts])


def freeze(model: torch.nn.Module, patterns: Sequence[str]) -> None:
    """Takes the parameters whose names match a shell pattern out of training; a pattern that matches none is an error."""
    named = dict(model.named_parameters())
    for pattern in patterns:
        matched = fnmatch.filter(named, pattern)
        if not matched:
            raise InputError(f"train.frozen: {pattern!r} matches no parameter; names look like {', '.join(list(named)[:3])}, ...")
        for name in matched:
            named[name].requires_grad_(False)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases and lone vectors do not. The layout tells them, since ZeRO-3 flattens the tensors."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in trainable if len(p.tensor_layout.shape) > 1]  # type: ignore[attr-defined]
    rest = [p for p in trainable if len(p.tensor_layout.shape) == 1]  # type: ignore[attr-defined]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
