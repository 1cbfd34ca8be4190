"""The one place that touches DeepSpeed's private state: this rank's masters, moments and reduced gradients as slices.

======  ==================================  ==============================================  ===========================
stage   optimizer class                     fp32 masters (their key in Adam's state)        reduced gradients
======  ==================================  ==============================================  ===========================
0       torch's own                         the parameters                                  ``parameter.grad``
1, 2    ``DeepSpeedZeroOptimizer``          ``single_partition_of_fp32_groups``             ``averaged_gradients``
1 bf16  ``BF16_Optimizer``                  ``fp32_groups_flat_partition``                  ``fp32_groups_gradients``
3       ``DeepSpeedZeroOptimizer_Stage3``   ``fp32_partitioned_groups_flat``                ``averaged_gradients``
======  ==================================  ==============================================  ===========================

With an offloaded optimizer the gradients are ``flat.grad``. Written against DeepSpeed 0.19.8; ``check`` refuses a
version that lacks one of the attributes used, and configurations that were never tested.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from megatron_omni.checkpoint.comm import Comm, default_comm
from megatron_omni.checkpoint.load import Checkpoint, open_checkpoint
from megatron_omni.checkpoint.slices import Kind, LocalSlice
from megatron_omni.parallel.layers import layout_of
from megatron_omni.runtime.errors import InputError, WorkError
from megatron_omni.runtime.seeds import stable_seed

MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")
TESTED = "0.19.8"
USED: dict[type, tuple[str, ...]] = {
    DeepSpeedZeroOptimizer_Stage3: (
        *("optimizer", "fp32_partitioned_groups_flat", "fp16_groups", "grad_position", "get_param_id", "averaged_gradients"),
        *("offload_optimizer", "checkpoint_event_prologue", "checkpoint_event_epilogue", "_reassign_or_swap_out_partitioned_parameters"),
    ),
    DeepSpeedZeroOptimizer: (
        *("optimizer", "single_partition_of_fp32_groups", "averaged_gradients", "cpu_offload", "get_param_id", "update_lp_params"),
    ),
    BF16_Optimizer: ("optimizer", "fp32_groups_flat_partition", "fp32_groups_gradients", "bf16_groups", "update_lp_params"),
}


@dataclass(frozen=True)
class _Home:
    """Where this rank's part of a trainable parameter lives: ``flat[offset : offset + length]``."""

    name: str
    parameter: Any
    """``nn.Parameter`` with DeepSpeed's attributes."""
    start: int
    """In the flattened parameter."""
    length: int
    flat: Any
    """Tensor: the optimizer's own parameter."""
    offset: int
    group: int

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.detach().view(-1).narrow(0, self.offset, self.length)

    def slice(self, kind: Kind, tensor: torch.Tensor) -> LocalSlice:
        return LocalSlice(self.name, kind, layout_of(self.parameter), self.start, tensor)


# --------------------------------------------------------------------------- start-up


def check(engine: DeepSpeedEngine) -> None:
    """Refuses what this adapter cannot handle, and tensor-parallel peers that hold different ranges. Collective."""
    optimizer, zero = engine.optimizer, engine._config.zero_config
    if type(optimizer) not in USED and optimizer is not engine.basic_optimizer:
        raise InputError(
            f"DeepSpeed chose {type(optimizer).__name__}, whose state cannot be saved here; use fp32, or bf16 with ZeRO 1, 2 or 3"
        )
    missing = [name for name in USED.get(type(optimizer), ()) if not hasattr(optimizer, name)]
    if missing:
        raise WorkError(f"DeepSpeed {deepspeed.__version__}: {type(optimizer).__name__} has no {', '.join(missing)}; install {TESTED}")
    base = _base_optimizer(engine)
    if not isinstance(base, torch.optim.Adam | DeepSpeedCPUAdam):
        raise InputError(f"optimizer {type(base).__name__}: its state cannot be saved here; use torch.optim.AdamW or DeepSpeedCPUAdam")
    offload = [part for part in (zero.offload_optimizer, zero.offload_param) if part is not None]
    untested = {
        "zero_optimization.round_robin_gradients": zero.round_robin_gradients,
        "zero_optimization.zero_hpz_partition_size above 1": zero.zero_hpz_partition_size > 1,
        "zero_optimization.zero_quantized_nontrainable_weights": zero.zero_quantized_nontrainable_weights,
        "offload to nvme": any(part.device == "nvme" for part in offload),
        "zero_optimization.offload_optimizer.ratio below 1": zero.offload_optimizer is not None and zero.offload_optimizer.ratio < 1,
    }
    for setting, on in untested.items():
        if on:
            raise InputError(
                f"{setting}: checkpoints of this were never tested and may be wrong; turn it off in the DeepSpeed configuration"
            )
    homes = list(_homes(engine))
    for home in homes:
        if home.flat.dtype != torch.float32:
            raise InputError(f"{home.name}: its master is {home.flat.dtype}, expected float32")
    if engine.mpu is not None and engine.mpu.get_model_parallel_world_size() > 1:
        _check_peers(homes, engine.mpu.get_model_parallel_group())


def _check_peers(homes: list[_Home], group: dist.ProcessGroup) -> None:
    """Gradients are summed over the group range by range, so all its ranks must hold the same ones."""
    own = stable_seed(*(f"{home.name} {home.start} {home.length}" for home in homes))
    low, high = (torch.tensor([own], device=homes[0].parameter.device if homes else None) for _ in range(2))
    dist.all_reduce(low, dist.ReduceOp.MIN, group)
    dist.all_reduce(high, dist.ReduceOp.MAX, group)
    if int(low) != int(high):
        raise WorkError("tensor-parallel ranks hold different ranges of the parameters: do all parts have the same number of elements?")


# --------------------------------------------------------------------------- weights, moments, gradients


def slices(engine: DeepSpeedEngine) -> list[LocalSlice]:
    """Live views of this rank's fp32 masters and Adam moments (zeros before the first step, which has none yet)."""
    state = _base_optimizer(engine).state
    found = []
    for home in _homes(engine):
        found.append(home.slice("param", home.view(home.flat)))
        for kind in MOMENTS:
            moment = state[home.flat].get(kind) if home.flat in state else None
            found.append(home.slice(kind, torch.zeros(home.length) if moment is None else home.view(moment)))
    return found


def frozen_slices(engine: DeepSpeedEngine) -> list[LocalSlice]:
    """Live views of what this rank holds of the parameters that do not train, in their own dtype."""
    found = []
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            start, length = _partition(parameter)
            held = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
            if length:
                found.append(LocalSlice(name, "param", layout_of(parameter), start, held.detach().view(-1)[:length]))
    return found


def gradients(engine: DeepSpeedEngine, names: Collection[str] | None = None) -> list[LocalSlice]:
    """Live views of the reduced gradients (of ``names``, or all), between the last ``backward`` of a step and ``step``.

    What is changed in them counts for norm, clipping and update. The bf16 optimizer of ZeRO-1 keeps whole gradients.
    """
    optimizer = engine.optimizer
    homes = [home for home in _homes(engine) if names is None or home.name in names]
    if _is_offloaded(engine):
        return [home.slice("grad", home.view(home.flat.grad)) for home in homes]
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        places = {id(p): (i, j) for i, group in enumerate(optimizer.fp16_groups) for j, p in enumerate(group)}
        found = []
        for home in homes:
            i, j = places[id(home.parameter)]
            found.append(home.slice("grad", optimizer.averaged_gradients[i][j][: home.length]))
        return found
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return [home.slice("grad", _averaged(optimizer, home)) for home in homes]
    if isinstance(optimizer, BF16_Optimizer):
        grads = dict(_bf16_gradients(optimizer))
        return [
            LocalSlice(name, "grad", layout_of(p), 0, grads[id(p)].view(-1))
            for name, p in engine.module.named_parameters()
            if id(p) in grads and (names is None or name in names)
        ]
    found = []
    for home in homes:
        if home.parameter.grad is None:
            raise WorkError(f"{home.name} has no gradient: every rank must run every branch, and call this after backward")
        home.parameter.grad = home.parameter.grad.contiguous()  # a transposed one could not be flattened in place
        found.append(home.slice("grad", home.view(home.parameter.grad)))
    return found


def sum_gradients_over_tensor_parallel(engine: DeepSpeedEngine, group: dist.ProcessGroup, names: Collection[str]) -> None:
    """Sums the reduced gradients of the parameters ``names`` over the tensor-parallel ``group``, in one all-reduce.

    They are replicated weights that each rank fed with part of the rows, so each holds part of the gradient. Called by
    all ranks between the last ``backward`` of a step and ``step``, which computes norm and clipping after it.
    """
    wanted = frozenset(names)
    unknown = wanted.difference(name for name, p in engine.module.named_parameters() if p.requires_grad)
    if unknown:
        raise WorkError(f"no trainable parameter is called {sorted(unknown)[0]}")
    parts = [piece.tensor for piece in gradients(engine, wanted)]
    if not parts:
        return
    total = torch.cat(parts)
    dist.all_reduce(total, group=group)
    for part, summed in zip(parts, torch.split(total, [part.numel() for part in parts]), strict=True):
        part.copy_(summed)
    if _is_offloaded(engine):
        # Its norms were taken during backward.
        for home in _homes(engine):
            if home.name in wanted:
                norm = home.view(home.flat.grad).norm()
                engine.optimizer.norm_for_param_grads[engine.optimizer.get_param_id(home.parameter)] = norm


def grad_norm(engine: DeepSpeedEngine) -> float:
    """Norm of the whole reduced gradient, before clipping; what DeepSpeed does not report without ZeRO. Collective."""
    mpu = engine.mpu
    first = mpu is None or mpu.get_model_parallel_rank() == 0
    cut = {name for name, p in engine.module.named_parameters() if first or getattr(p, "tensor_model_parallel", False)}
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    for piece in gradients(engine, cut):
        total += piece.tensor.double().square().sum().to(total.device)
    if mpu is not None:
        dist.all_reduce(total, group=mpu.get_model_parallel_group())
    if engine.zero_optimization() and not isinstance(engine.optimizer, BF16_Optimizer):
        dist.all_reduce(total, group=engine.data_parallel_group if mpu is None else mpu.get_data_parallel_group())
    return float(total.sqrt())


# --------------------------------------------------------------------------- restoring


@torch.no_grad()
def restore(engine: DeepSpeedEngine, path: Path, comm: Comm | None = None) -> Checkpoint:
    """Continues from ``path`` (a run: its newest good checkpoint), saved by any topology and stage. Collective.

    Fills masters, moments, frozen weights and counters; learning rates are set by the caller at every step. Pass the
    returned checkpoint's ``frozen`` on to the next ``save``. After an error the engine's weights are not usable.
    """
    for flat, adam in _adam_states(engine):
        for tensor in (flat, *(adam[kind] for kind in MOMENTS)):
            tensor.zero_()  # the padding behind the slices is uninitialised memory
    for parameter in engine.module.parameters():
        if not parameter.requires_grad and hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.zero_()
    names = [name for name, _ in engine.module.named_parameters()]
    checkpoint = open_checkpoint(path, comm or default_comm(), [*slices(engine), *frozen_slices(engine)], names)
    state = checkpoint.state
    for _, adam in _adam_states(engine):
        step = adam["step"]
        adam["step"] = torch.full_like(step, state.updates) if isinstance(step, torch.Tensor) else state.updates
    _refresh(engine)
    engine.global_steps, engine.skipped_steps = state.step, state.skipped_steps
    engine.global_samples = state.step * engine.train_batch_size()
    engine.micro_steps = state.step * engine.gradient_accumulation_steps()
    return checkpoint


def _refresh(engine: DeepSpeedEngine) -> None:
    """Brings the model's own parameters up to date with the masters: without it training goes on from other weights."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.checkpoint_event_prologue()
        for i in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        optimizer.checkpoint_event_epilogue()
    elif optimizer is not engine.basic_optimizer:
        optimizer.update_lp_params()


def _adam_states(engine: DeepSpeedEngine) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Each master with Adam's state for it, which is made first if there was no step yet."""
    optimizer, base = engine.optimizer, _base_optimizer(engine)
    device_step = any(group.get("fused") or group.get("capturable") for group in base.param_groups)
    for flat in _flats(optimizer) or [home.flat for home in _homes(engine)]:
        state = base.state[flat]
        if not state:
            step = torch.zeros((), device=flat.device if device_step else None)
            state["step"] = 0 if isinstance(base, DeepSpeedCPUAdam) else step
            state.update({kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS})
        yield flat.detach(), state


# --------------------------------------------------------------------------- DeepSpeed's inside


def _base_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    base: torch.optim.Optimizer = engine.optimizer.optimizer if type(engine.optimizer) in USED else engine.optimizer
    return base


def _flats(optimizer: object) -> list[torch.Tensor]:
    """All fp32 masters, padding included; empty for stage 0."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return list(optimizer.fp32_partitioned_groups_flat)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return list(optimizer.single_partition_of_fp32_groups)
    if isinstance(optimizer, BF16_Optimizer):
        return list(optimizer.fp32_groups_flat_partition)
    return []


def _homes(engine: DeepSpeedEngine) -> Iterator[_Home]:
    """Where this rank's part of each trainable parameter lives, parameters of which it has nothing left out."""
    optimizer = engine.optimizer
    flats = _flats(optimizer)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start, length = _partition(parameter)
            home = _Home(name, parameter, start, length, flats[group], offset, group)
        elif flats:
            mapping = parameter._hp_mapping
            if mapping is None:
                continue
            address, group = mapping.lp_fragment_address, mapping.param_group_index
            home = _Home(name, parameter, address.start, address.numel, flats[group], mapping.hp_fragment_address.start, group)
        else:
            home = _Home(name, parameter, 0, parameter.numel(), parameter, 0, 0)
        if home.length:
            yield home


def _partition(parameter: Any) -> tuple[int, int]:
    """Start and length of this rank's part of a parameter that ZeRO-3 may have cut."""
    if not hasattr(parameter, "ds_tensor"):
        return 0, parameter.numel()
    n = parameter.partition_numel()
    start = n * dist.get_rank(parameter.ds_process_group)
    return start, max(0, min(n, parameter.ds_numel - start))


def _is_offloaded(engine: DeepSpeedEngine) -> bool:
    return bool(getattr(engine.optimizer, "offload_optimizer", False) or getattr(engine.optimizer, "cpu_offload", False))


def _averaged(optimizer: DeepSpeedZeroOptimizer, home: _Home) -> torch.Tensor:
    """A parameter's part of the averaged gradients of stages 1 and 2: a list of fragments, or one flat buffer."""
    group = optimizer.averaged_gradients.get(home.group)
    if group is None:
        raise WorkError("gradients exist only between the last backward of a step and the step")
    flat = getattr(group, "flat_partition", None)
    if flat is not None:
        return home.view(flat)
    index = home.parameter._index_in_param_group
    if not group[index].is_contiguous():
        group[index] = group[index].contiguous()
    gradient: torch.Tensor = group[index].detach().view(-1)
    assert gradient.numel() == home.length, (home.name, gradient.shape, home.length)
    return gradient


def _bf16_gradients(optimizer: BF16_Optimizer) -> Iterator[tuple[int, torch.Tensor]]:
    for parameters, grads in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
        for parameter, gradient in zip(parameters, grads, strict=True):
            yield id(parameter), gradient.detach()
