import errno
import itertools
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from megatron_omni.checkpoint import save as saving
from megatron_omni.checkpoint import store
from megatron_omni.checkpoint.comm import Alone
from megatron_omni.checkpoint.load import open_checkpoint
from megatron_omni.checkpoint.save import checkpoints, save, save_frozen
from megatron_omni.checkpoint.slices import LocalSlice
from megatron_omni.parallel.layout import TensorLayout
from megatron_omni.runtime.errors import WorkError
from megatron_omni.runtime.seeds import rng
from tests.checkpoint.synthetic import FROZEN, TENSORS, frozen_slices, logical, on_ranks, slices, state

TOPOLOGIES = list(itertools.product([1, 2, 4], [1, 2, 4], [0, 1, 3]))


def save_as(run: Path, step: int, data: int, tensor: int, zero: int, **options: object) -> list[object]:
    return on_ranks(
        data * tensor, lambda comm: save(run, state(step, data, tensor, zero), slices(comm.rank, data, tensor, zero, step), comm, **options)
    )


@pytest.mark.parametrize(("data", "tensor", "zero"), TOPOLOGIES)
def test_what_any_topology_saved_loads_in_others(tmp_path: Path, data: int, tensor: int, zero: int) -> None:
    assert save_as(tmp_path, 3, data, tensor, zero) == [tmp_path / "checkpoints" / "step-00000003"] * (data * tensor)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.verify() == []
    for name in TENSORS:
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            assert torch.equal(checkpoint.read_full(name, kind), logical(name, kind, 3))
    turn = TOPOLOGIES.index((data, tensor, zero)) % 4
    for new_data, new_tensor, new_zero in TOPOLOGIES[turn::4]:  # the whole grid is the planner's own test
        for rank in range(new_data * new_tensor):
            wanted = slices(rank, new_data, new_tensor, new_zero, None)
            checkpoint.read(wanted)
            for got, expected in zip(wanted, slices(rank, new_data, new_tensor, new_zero, 3), strict=True):
                assert torch.equal(got.tensor, expected.tensor)


def test_replicas_are_written_once_and_shared_out(tmp_path: Path) -> None:
    save_as(tmp_path, 1, 4, 1, 0)
    sizes = [path.stat().st_size for path in sorted(checkpoints(tmp_path)[0].glob("rank-*"))]
    values = 3 * 4 * sum(torch.Size(shape).numel() for shape, _, _ in TENSORS.values())
    assert len(sizes) == 4
    assert values < sum(sizes) < values + 4 * 4000  # the rest is headers


def test_rank_files_are_plain_safetensors(tmp_path: Path) -> None:
    save_as(tmp_path, 1, 1, 1, 3)
    tensors = safetensors.torch.load_file(checkpoints(tmp_path)[0] / "rank-00000.safetensors")
    assert torch.equal(tensors["exp_avg/norm.weight[0:7]"], logical("norm.weight", "exp_avg", 1))


def test_frozen_weights_are_stored_once_and_kept_while_referenced(tmp_path: Path) -> None:
    old = save_frozen(tmp_path, [LocalSlice("other", "param", TensorLayout((3,)), 0, torch.ones(3))], Alone())
    frozen = save_frozen(tmp_path, frozen_slices(), Alone())
    assert save_frozen(tmp_path, frozen_slices(), Alone()) == frozen
    for step in (1, 2, 3):
        save(tmp_path, state(step), slices(0, 1, 1, 3, step), Alone(), frozen=frozen, keep_last=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003", "step-00000002"]
    assert [path.name for path in (tmp_path / "frozen").iterdir()] == [frozen] != [old]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000003\n"
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.is_frozen(FROZEN[0])
    assert torch.equal(checkpoint.read_full(FROZEN[0]), logical(FROZEN[0], "param"))
    assert save_frozen(tmp_path, [], Alone()) is None


def test_bf16_is_stored_as_it_is(tmp_path: Path) -> None:
    weights = torch.randn(9).bfloat16()
    layout = TensorLayout((9,))
    save(tmp_path, state(1), [LocalSlice("w", "param", layout, 0, weights)], Alone())
    back = torch.empty(4, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(tmp_path, fill=[LocalSlice("w", "param", layout, 3, back)])
    assert torch.equal(back, weights[3:7])
    assert torch.equal(checkpoint.read_full("w"), weights.float())


def test_a_second_save_of_a_step_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, state(1), slices(0, 1, 1, 3, 5), Alone())
    save(tmp_path, state(1), slices(0, 1, 1, 3, 6), Alone())
    assert torch.equal(open_checkpoint(tmp_path).read_full("scale"), logical("scale", "param", 6))
    assert len(checkpoints(tmp_path)) == 1


def test_a_save_killed_between_its_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, state(1), slices(0, 1, 1, 3, 5), Alone())

    class KilledError(BaseException):
        pass

    rename = os.rename

    def killed(source: Path, target: Path) -> None:
        if ".tmp-" in Path(source).name:
            raise KilledError
        rename(source, target)

    monkeypatch.setattr(saving.os, "rename", killed)
    with pytest.raises(KilledError):
        save(tmp_path, state(1), slices(0, 1, 1, 3, 6), Alone())
    monkeypatch.undo()
    assert torch.equal(open_checkpoint(tmp_path).read_full("scale"), logical("scale", "param", 5))
    save(tmp_path, state(1), slices(0, 1, 1, 3, 6), Alone())
    assert torch.equal(open_checkpoint(tmp_path).read_full("scale"), logical("scale", "param", 6))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000001"]


@pytest.mark.parametrize("world", [1, 3])
def test_a_full_disk_on_one_rank_is_known_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    save_as(tmp_path, 1, world, 1, 3)
    write = store.write_slices

    def full(path: Path, pieces: list[LocalSlice]) -> object:
        if f"{world - 1:05d}" in path.name:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, pieces)

    monkeypatch.setattr(saving, "write_slices", full)
    for error in save_as(tmp_path, 2, world, 1, 3):
        assert isinstance(error, WorkError)
        assert f"rank {world - 1}" in str(error)
        assert "No space left" in str(error)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000001"]
    monkeypatch.undo()
    save_as(tmp_path, 2, world, 1, 3)
    assert open_checkpoint(tmp_path).state.step == 2


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CHUNK", 64)
    path = tmp_path / "f"
    data = os.urandom(1000)
    with store.HashedFile(path) as file:
        raw = file._file

        class Short:
            def write(self, part: memoryview) -> int:
                return raw.write(part[:7])

            fileno, close = raw.fileno, raw.close

        file._file = Short()
        file.write(data)
        record = file.record()
    assert path.read_bytes() == data
    with store.HashedFile(tmp_path / "g") as file:
        file.write(data)
        assert file.record() == record


@pytest.mark.parametrize("held", [[], [(0, 3)], [(0, 10), (10, 10), (10, 10)]])
def test_an_incomplete_state_is_refused(tmp_path: Path, held: list[tuple[int, int]]) -> None:
    layout = TensorLayout((20,))
    pieces = [LocalSlice("w", "param", layout, start, torch.zeros(n)) for start, n in held]
    if len(held) == 3:
        pieces.append(LocalSlice("w", "param", layout, 5, torch.zeros(10)))
    with pytest.raises(WorkError, match="nothing"):
        save(tmp_path, state(1), pieces, Alone())
    assert checkpoints(tmp_path) == []


SIZE = 300_000


def save_for_ever(run: Path, first: int, done: "multiprocessing.sharedctypes.Synchronized[int]") -> None:
    for step in itertools.count(first):
        weights = LocalSlice("w", "param", TensorLayout((SIZE,)), 0, torch.full((SIZE,), float(step)))
        save(run, state(step), [weights], Alone(), keep_last=2)
        done.value = step


def test_sigkill_at_random_moments_of_a_save(tmp_path: Path) -> None:
    """A writer is killed again and again; what it had reported as saved, or a newer step, always loads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch"])
    done = context.Value("q", 0)
    random = rng("kill")
    for _ in range(20):
        before = done.value
        process = context.Process(target=save_for_ever, args=(tmp_path, before + 1, done))
        process.start()
        while done.value == before and process.is_alive():
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.03))
        process.kill()
        process.join()
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint.state.step >= done.value > before
        assert torch.equal(checkpoint.read_full("w"), torch.full((SIZE,), float(checkpoint.state.step)))
        assert checkpoint.verify() == []
        done.value = checkpoint.state.step
