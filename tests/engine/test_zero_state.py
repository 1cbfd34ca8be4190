"""One run that goes through every ZeRO stage and both topologies of two ranks, against plain AdamW in one process."""

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron_omni.checkpoint.comm import Distributed
from megatron_omni.checkpoint.load import Checkpoint, open_checkpoint
from megatron_omni.checkpoint.save import checkpoints, save, save_frozen
from megatron_omni.checkpoint.slices import KINDS
from megatron_omni.checkpoint.state import CheckpointState, SavedTopology
from megatron_omni.engine import zero_state
from megatron_omni.engine.weights import fill
from megatron_omni.parallel.collectives import gather_rows, split_rows
from megatron_omni.parallel.layers import ColumnParallelLinear, Linear, RowParallelLinear, new_parameter, split_by_rows
from megatron_omni.parallel.layout import TensorLayout
from megatron_omni.parallel.topology import ParallelGroups, TensorParallel, Topology
from megatron_omni.runtime.errors import InputError, WorkError
from megatron_omni.runtime.seeds import generator
from tests.harness import run_ranks

CLIP, LR, ROWS = 0.02, 0.01, 8


class Case(NamedTuple):
    zero: int
    data: int = 2
    tensor: int = 1
    offload: bool = False
    persist: int = 0
    """Elements up to which ZeRO-3 keeps a parameter whole."""
    sub_group: int = 1_000_000
    accumulation: int = 1
    bf16: bool = False


class Toy(nn.Module):
    """Odd sizes, a fused gate|up, a layer whose ranks see different rows, a frozen layer, a lone number."""

    def __init__(self, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.embed = Linear(5, 6)
        self.gate_up = ColumnParallelLinear(6, [6, 6], tp)
        self.down = RowParallelLinear(6, 6, tp, [True, True])
        self.by_rows = Linear(6, 7, bias=True)
        split_by_rows(self.by_rows)
        self.frozen = Linear(7, 3)
        self.frozen.requires_grad_(False)
        self.scale = new_parameter(TensorLayout((1,)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        gate, up = self.gate_up(h)
        h = h + self.down(nn.functional.silu(gate) * up)
        h = gather_rows(self.by_rows(split_rows(h, self.tp)), self.tp)
        return ((self.frozen(h) * self.scale - 1) ** 2).mean()


def initial(name: str, layout: TensorLayout) -> torch.Tensor:
    return torch.randn(layout.shape, generator=generator("toy", name)) * 0.5 + 0.1


def batch(step: int) -> torch.Tensor:
    return torch.randn(ROWS, 5, generator=generator("batch", step))


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained[::2], "weight_decay": 0.1}, {"params": trained[1::2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR)


def start(case: Case) -> Any:
    groups = ParallelGroups(Topology(2, case.tensor, dist.get_rank()))
    micro = ROWS // case.data // case.accumulation
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": CLIP,
        "steps_per_print": 10**9,
        "bf16": {"enabled": case.bf16},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": case.zero,
            "stage3_param_persistence_threshold": case.persist,
            "sub_group_size": case.sub_group,
            "overlap_comm": False,
        },
    }
    if case.offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        if case.zero == 3:
            config["zero_optimization"]["offload_param"] = {"device": "cpu"}
    init = deepspeed.zero.Init(data_parallel_group=groups.get_data_parallel_group(), config_dict_or_path=config) if case.zero == 3 else None
    with init or nullcontext():
        model = Toy(groups.tensor_parallel)
    fill(model, initial)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer(model), config=config, mpu=groups, dist_init_required=False)
    zero_state.check(engine)
    return engine


def train(engine: Any, case: Case, step: int, expected: "Reference | None" = None) -> float:
    rank = dist.get_rank() // case.tensor
    rows = batch(step).chunk(case.data)[rank]
    for part in rows.chunk(case.accumulation):
        engine.backward(engine(part.bfloat16() if case.bf16 else part))
        if engine.is_gradient_accumulation_boundary():
            if case.tensor > 1:
                zero_state.sum_gradients_over_tensor_parallel(
                    engine, engine.mpu.get_model_parallel_group(), ["by_rows.weight", "by_rows.bias"]
                )
            norm = zero_state.grad_norm(engine)
            if expected:
                expected.check_gradients(engine, case, norm)
        engine.step()
    reported = engine.get_global_grad_norm()
    assert reported is None or float(reported) == pytest.approx(norm, rel=1e-5), (case, float(reported), norm)
    return norm


def save_to(run: Path, engine: Any, case: Case, frozen: str | None = None) -> str | None:
    comm = Distributed()
    frozen = frozen or save_frozen(run, zero_state.frozen_slices(engine), comm)
    state = CheckpointState(
        step=engine.global_steps,
        samples=engine.global_samples,
        skipped_steps=engine.skipped_steps,
        topology=SavedTopology(data=case.data, tensor=case.tensor, zero=case.zero),
    )
    save(run, state, zero_state.slices(engine), comm, frozen)
    return frozen


class Reference:
    """The same model and steps in one process."""

    def __init__(self) -> None:
        self.model = Toy(TensorParallel())
        fill(self.model, initial)
        self.optimizer = optimizer(self.model)

    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        self.model(batch(step)).backward()
        self.grads = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), CLIP))
        self.optimizer.step()

    def check_gradients(self, engine: Any, case: Case, norm: float) -> None:
        assert norm > 2 * CLIP  # else clipping would not be tested
        assert norm == pytest.approx(self.norm, rel=1e-5), case
        for piece in zero_state.gradients(engine):
            whole = self.grads[piece.name]
            own = piece.layout.cut(whole).flatten()[piece.start : piece.start + piece.length]
            # Relative to the tensor, or to the whole gradient where a lone number nearly cancels.
            assert (piece.tensor - own).norm() <= 1e-5 * whole.norm() + 3e-6 * self.norm, (case, piece.name)

    def check_state(self, checkpoint: Checkpoint, case: Case) -> None:
        for name, p in self.model.named_parameters():
            state = self.optimizer.state.get(p, {})
            assert checkpoint.kinds(name) == (list(KINDS) if state else ["param"])
            for kind in checkpoint.kinds(name):
                expected = p if kind == "param" else state[kind]
                assert (checkpoint.read_full(name, kind) - expected).norm() <= 1e-5 * expected.norm(), (case, name, kind)


CHAIN = [
    Case(zero=3),
    Case(zero=3, tensor=2, data=1),
    Case(zero=1),
    Case(zero=1, tensor=2, data=1),
    Case(zero=3, persist=1000, sub_group=20),
    Case(zero=2, tensor=2, data=1, accumulation=2),
    Case(zero=0, tensor=2, data=1),
    Case(zero=2),
    Case(zero=3, tensor=2, data=1, offload=True),
    Case(zero=0),
    Case(zero=2, tensor=2, data=1, offload=True),
    Case(zero=3, tensor=2, data=1, persist=1000),
]


def contents(checkpoint: Checkpoint) -> dict[tuple[str, str], torch.Tensor]:
    return {(name, kind): checkpoint.read_full(name, kind) for name in checkpoint.names() for kind in checkpoint.kinds(name)}


def check_the_start(run: Path, engine: Any, case: Case) -> None:
    """Before the first step the weights are those that were filled in, and there are no moments yet: zeros are saved."""
    check_refusals(engine)
    save_to(run, engine, case)
    for (name, kind), tensor in contents(open_checkpoint(run)).items():
        assert torch.equal(tensor, initial(name, TensorLayout(tuple(tensor.shape))) if kind == "param" else torch.zeros_like(tensor))


def check_refusals(engine: Any) -> None:
    """What was never tested is refused by name."""
    zero = engine._config.zero_config
    for setting, value in (("round_robin_gradients", True), ("zero_hpz_partition_size", 2)):
        with mock.patch.object(zero, setting, value), pytest.raises(InputError, match=setting):
            zero_state.check(engine)
    with mock.patch.dict(zero_state.USED, {type(engine.optimizer): ("gone",)}), pytest.raises(WorkError, match=r"DeepSpeed .* has no gone"):
        zero_state.check(engine)
    with pytest.raises(WorkError, match="no trainable parameter"):
        zero_state.sum_gradients_over_tensor_parallel(engine, None, ["frozen.weight"])


def chain(folder: str) -> list[str]:
    reference, steps = Reference(), itertools.count()
    previous: Path | None = None
    for number, case in enumerate(CHAIN):
        engine = start(case)
        run = Path(folder) / str(number)
        frozen = None
        if previous is None:
            check_the_start(run, engine, case)
        else:
            restored = zero_state.restore(engine, previous)
            assert restored.state.step == engine.global_steps == 2 * number
            frozen = save_to(run, engine, case)
            # Restored and saved again: the same bits, whatever cut them.
            before, after = contents(restored), contents(open_checkpoint(run))
            assert before.keys() == after.keys()
            for key, tensor in before.items():
                assert torch.equal(tensor, after[key]), (case, key)
        for step in itertools.islice(steps, 2):
            reference.step(step)
            train(engine, case, step, reference)
        save_to(run, engine, case, frozen)
        assert len({path.name for path in (run / "frozen").iterdir()}) == 1
        reference.check_state(open_checkpoint(run), case)
        previous = run
        engine.destroy()
    assert previous is not None
    return [path.name for path in checkpoints(previous)]


def test_a_run_through_all_stages_and_topologies_equals_plain_adamw(tmp_path: Path) -> None:
    last = 2 * len(CHAIN)
    assert run_ranks(chain, 2, str(tmp_path), timeout=280) == [[f"step-{last:08d}", f"step-{last - 2:08d}"]] * 2


RESUMED = [
    *(Case(zero=zero, accumulation=2) for zero in (0, 1, 2, 3)),
    Case(zero=3, tensor=2, data=1),
    *(Case(zero=zero, bf16=True, accumulation=2) for zero in (1, 2, 3)),
    *(Case(zero=zero, bf16=True, tensor=2, data=1) for zero in (1, 2, 3)),
    Case(zero=2, offload=True, accumulation=2),
]


def resume(folder: str) -> int:
    for number, case in enumerate(RESUMED):
        whole, run = Path(folder) / f"whole-{number}", Path(folder) / f"run-{number}"
        engine = start(case)
        norms = []
        for step in range(4):
            if step == 2:
                save_to(run, engine, case)
            norms.append(train(engine, case, step))
        save_to(whole, engine, case)
        engine.destroy()
        engine = start(case)
        train(engine, case, 7)  # other moments and a gradient lying about
        frozen = zero_state.restore(engine, run).frozen
        assert [train(engine, case, step) for step in (2, 3)] == norms[2:], case
        save_to(run, engine, case, frozen)
        engine.destroy()
        expected, got = contents(open_checkpoint(whole)), contents(open_checkpoint(run))
        assert len(expected) > 20
        assert expected.keys() == got.keys()
        for key, tensor in expected.items():
            assert torch.equal(tensor, got[key]), (case, key)
    return len(RESUMED)


def test_a_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    assert run_ranks(resume, 2, str(tmp_path), timeout=280) == [len(RESUMED)] * 2
