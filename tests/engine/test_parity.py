"""The engine against plain PyTorch: DP x TP x ZeRO give the losses, gradients and moments of one unsharded process.

The reference is written here on its own: dense logits, ``F.cross_entropy``, ``clip_grad_norm_``, ``torch.optim.AdamW``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_omni.config.load import load_recipe
from megatron_omni.engine import zero_state
from megatron_omni.engine.engine import OmniEngine
from megatron_omni.model.init import initial_value
from megatron_omni.model.omni import OmniModel
from megatron_omni.parallel.layers import layout_of
from megatron_omni.parallel.topology import ParallelGroups, TensorParallel, Topology
from megatron_omni.schema import Batch
from tests.factories import SHAPE, model_config, pack, packed
from tests.harness import run_ranks

STEPS, ROWS, LR, CLIP, DECAY, TEXT, CODEC = 5, 8, 5e-4, 0.5, 0.1, 1.0, 0.3
LAYOUTS = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(2, 2)]}
"""(tensor, data) by world size."""


def samples_of(step: int) -> list[list]:
    """The rows of a step's global batch; one is empty, some lack audio or speech."""
    first = 100 * step
    return [packed(range(first + 2 * row, first + 2 * row + 2), CONFIG) if row != 5 else [] for row in range(ROWS)]


CONFIG = model_config(acoustic_delay=1)


# --------------------------------------------------------------------------- reference


def reference_sums(model: OmniModel, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Summed text loss and summed loss per codebook, from dense logits."""
    hidden = model.hidden_states(batch)
    chosen = torch.stack([row[index] for row, index in zip(hidden, batch.supervised_BU, strict=True)])
    text = F.cross_entropy((chosen @ model.llm.head.weight.T).flatten(0, 1), batch.targets_BU.flatten(), reduction="sum")
    sums = []
    head = model.audio_head

    def capture(module, arguments):
        hidden_states, targets = arguments[:2]
        for k in range(targets.shape[1]):
            states = hidden_states if hidden_states.dim() == 2 else hidden_states[:, k]
            sums.append(F.cross_entropy(states @ module.weight[k].T, targets[:, k], reduction="sum"))

    hooks = [part.register_forward_pre_hook(capture) for part in (head.semantic_head, head.acoustic_head)]
    head(hidden, batch, torch.zeros(4), model.options)
    for hook in hooks:
        hook.remove()
    return text, sums


def reference_run() -> list[dict]:
    model = OmniModel(CONFIG, TensorParallel.single())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, layout_of(parameter), CONFIG, seed=0))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), eps=1e-8)
    steps = []
    for step in range(STEPS):
        batch = pack(samples_of(step), CONFIG)
        optimizer.zero_grad()
        text, codec = reference_sums(model, batch)
        counts = [(batch.codec_targets_BKF[:, k] >= 0).sum() for k in range(len(codec))]
        loss = TEXT * text / (batch.targets_BU >= 0).sum() + sum(CODEC * s / n for s, n in zip(codec, counts, strict=True))
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        steps.append({"loss": loss.item(), "norm": norm.item(), "gradients": grads})
    named = dict(model.named_parameters())
    steps[-1]["state"] = {
        "param": {n: p.detach() for n, p in named.items()},
        **{kind: {n: optimizer.state[p][kind] for n, p in named.items()} for kind in ("exp_avg", "exp_avg_sq")},
    }
    return steps


# --------------------------------------------------------------------------- engine


def assemble(pieces: Sequence, kind: str, logical: dict) -> None:
    """Writes this rank's slices into whole logical tensors, NaN where other ranks hold them."""
    for piece in pieces:
        if piece.kind != kind:
            continue
        whole = logical.setdefault(piece.name, torch.full(piece.layout.shape, torch.nan)).view(-1)
        for at, local, count in piece.layout.runs(piece.start, piece.length):
            whole[at : at + count] = piece.tensor.detach()[local - piece.start : local - piece.start + count]


def engine_run(folder: str, tensor: int, stages: Sequence[int]) -> dict[int, list[dict]]:
    """One rank: five steps under each stage; what it holds of gradients and state, by logical tensor."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    out = {}
    for stage in stages:
        groups = ParallelGroups(Topology(world, tensor, rank))
        data, data_rank = groups.topology.data, groups.topology.data_rank
        accumulation = 2
        micro = ROWS // data // accumulation
        overrides = [f"parallel.tensor={tensor}", f"batch.micro_rows={micro}", f"engine.deepspeed={folder}/zero{stage}.json"]
        recipe = load_recipe(Path(folder, "recipe.yaml"), overrides)
        engine = OmniEngine(recipe, CONFIG, groups, torch.device("cpu"))
        steps = []
        for step in range(STEPS):
            mine = samples_of(step)[data_rank::data]
            batches = [pack(mine[i * micro : (i + 1) * micro], CONFIG, tensor) for i in range(accumulation)]
            seen: dict = {}
            take = engine.deepspeed.step

            def spy(take=take, seen=seen, engine=engine):  # gradients exist between the last backward and the step
                if engine.deepspeed.is_gradient_accumulation_boundary():
                    assemble(zero_state.gradients(engine.deepspeed), "grad", seen)
                return take()

            engine.deepspeed.step = spy
            result = engine.step(step, batches, LR)
            engine.deepspeed.step = take
            steps.append({"loss": result.loss, "norm": result.grad_norm, "gradients": seen})
        state: dict = {kind: {} for kind in ("param", "exp_avg", "exp_avg_sq")}
        for kind, tensors in state.items():
            assemble(zero_state.slices(engine.deepspeed), kind, tensors)
        steps[-1]["state"] = state
        engine.deepspeed.destroy()
        out[stage] = steps
    return out


@pytest.fixture(scope="module")
def reference() -> list[dict]:
    return reference_run()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for stage in range(4):
        zero = {"stage": stage, "stage3_param_persistence_threshold": 100} if stage else {"stage": 0}
        auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        config = {key: "auto" for key in auto} | {"zero_optimization": zero, "steps_per_print": 10**9}
        (tmp_path / f"zero{stage}.json").write_text(json.dumps(config))
    recipe = {
        "run": {"dir": str(tmp_path / "run"), "wandb": {"mode": "disabled"}},
        "model": CONFIG.model_dump(mode="json"),
        "data": {"train": ["none"], "tokenizer": "none"},
        "row": vars(SHAPE),
        "batch": {"global_rows": ROWS},
        "optim": {"lr": LR, "betas": [0.9, 0.98], "weight_decay": DECAY, "clip": CLIP},
        "loss": {"text_weight": TEXT, "codec_weights": CODEC},
        "train": {"steps": STEPS},
        "engine": {"deepspeed": "", "dtype": "fp32"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path


def merged(ranks: Sequence[dict]) -> dict:
    """The ranks' parts as whole tensors; where several hold an element they must agree."""
    whole: dict = {}
    for part in ranks:
        for name, tensor in part.items():
            if name in whole:
                both = ~tensor.isnan() & ~whole[name].isnan()
                torch.testing.assert_close(tensor[both], whole[name][both], rtol=1e-4, atol=1e-7)
                tensor = tensor.where(~tensor.isnan(), whole[name])
            whole[name] = tensor
    return whole


def assert_close(ours: dict, expected: dict, what: str, tolerance: float = 1e-5) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (ours[name] - tensor).norm() / tensor.norm().clamp(min=1e-10)
        assert error <= tolerance, f"{what} of {name}: {error:.2e} of its norm"


@pytest.mark.parametrize(("world", "tensor", "data"), [(w, t, d) for w, layouts in LAYOUTS.items() for t, d in layouts])
def test_layout_equals_plain_pytorch(folder: Path, reference: list[dict], world: int, tensor: int, data: int) -> None:
    stages = (0, 1, 2, 3)
    ranks = run_ranks(engine_run, world, str(folder), tensor, stages, timeout=600)
    for stage in stages:
        where = f"TP{tensor} x DP{data}, ZeRO-{stage}"
        for step, expected in enumerate(reference):
            parts = [rank[stage][step] for rank in ranks]
            for part in parts:
                assert part["loss"] == pytest.approx(expected["loss"], rel=1e-5), f"{where}, loss of step {step}"
                assert part["norm"] == pytest.approx(expected["norm"], rel=1e-5), f"{where}, gradient norm of step {step}"
            assert_close(merged([part["gradients"] for part in parts]), expected["gradients"], f"{where}, step {step}: gradient")
        last = [rank[stage][-1]["state"] for rank in ranks]
        for kind in ("exp_avg", "exp_avg_sq"):
            assert_close(merged([state[kind] for state in last]), reference[-1]["state"][kind], f"{where}: {kind}")
        # over the whole model: where a gradient is rounding noise Adam still moves by the learning rate
        start = {n: initial_value(n, layout, CONFIG, 0) for n, layout in shapes().items()}
        final, params = reference[-1]["state"]["param"], merged([state["param"] for state in last])
        missed = sum((params[name] - final[name]).square().sum() for name in final).sqrt()
        update = sum((final[name] - start[name]).square().sum() for name in final).sqrt()
        assert missed <= 1e-3 * update, f"{where}: parameters off by {missed / update:.2e} of the update"


def shapes() -> dict:
    return {name: layout_of(p) for name, p in OmniModel(CONFIG, TensorParallel.single()).named_parameters()}
