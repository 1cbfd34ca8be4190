import ast
import inspect
import shutil
from pathlib import Path

import pytest
import torch

from megatron_omni import checkpoint as package
from megatron_omni.checkpoint import store
from megatron_omni.checkpoint.comm import Alone
from megatron_omni.checkpoint.inspect import info, verify
from megatron_omni.checkpoint.load import Checkpoint, open_checkpoint
from megatron_omni.checkpoint.save import checkpoints, save, save_frozen
from megatron_omni.checkpoint.slices import LocalSlice
from megatron_omni.parallel.layout import TensorLayout
from megatron_omni.runtime.errors import InputError, WorkError
from megatron_omni.runtime.seeds import rng
from tests.checkpoint.synthetic import FROZEN, TENSORS, frozen_slices, logical, on_ranks, slices, state


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two checkpoints of two ranks, steps 1 and 2, that share frozen weights."""
    for step in (1, 2):

        def work(comm: object, step: int = step) -> object:
            frozen = save_frozen(tmp_path, frozen_slices(), comm)
            return save(tmp_path, state(step, 2), slices(comm.rank, 2, 1, 3, step), comm, frozen=frozen)

        for result in on_ranks(2, work):
            assert isinstance(result, Path), result
    return tmp_path


FILES = ["manifest.json", "index.json", "index.safetensors", "state.json", "rank-00000.safetensors", "rank-00001.safetensors"]


def everything(rank: int = 0, data: int = 1) -> list[LocalSlice]:
    return slices(rank, data, 1, 3, None) + frozen_slices(fill=False)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << (at % 8)
    path.write_bytes(data)


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_anywhere_is_found_and_the_older_checkpoint_taken(run: Path, file: str) -> None:
    path = run / "checkpoints" / "step-00000002" / file
    whole = path.read_bytes()
    for at in rng("flip", file).integers(0, len(whole), 8).tolist():
        flip(path, at)
        with pytest.raises(WorkError, match=file):
            open_checkpoint(path.parent, fill=everything())
        assert any(file in fault for fault in verify(path.parent).faults)
        wanted = everything()
        assert open_checkpoint(run, fill=wanted).state.step == 1
        for piece in wanted[:-1]:
            assert torch.equal(piece.tensor, logical(piece.name, piece.kind, 1).flatten())
        path.write_bytes(whole)
    assert open_checkpoint(run, fill=everything()).state.step == 2


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "longer", "swapped"])
def test_missing_cut_and_swapped_files(run: Path, file: str, damage: str) -> None:
    path = run / "checkpoints" / "step-00000002" / file
    match damage:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(path.read_bytes()[:-1])
        case "empty":
            path.write_bytes(b"")
        case "longer":
            path.write_bytes(path.read_bytes() + b"\0")
        case "swapped":
            path.write_bytes((run / "checkpoints" / "step-00000001" / file).read_bytes())
    if damage == "swapped" and file in ("index.json", "index.safetensors"):
        assert verify(path.parent).faults == []  # the same bytes in both
        return
    with pytest.raises(WorkError, match=file if damage != "swapped" else None):
        open_checkpoint(path.parent, fill=everything())
    # A checkpoint without a manifest is no checkpoint: nobody can say which file is missing.
    assert verify(run).faults != []
    assert open_checkpoint(run, fill=everything()).state.step == 1


def test_damage_that_one_rank_sees_moves_all_ranks(run: Path) -> None:
    path = run / "checkpoints" / "step-00000002" / "rank-00001.safetensors"
    flip(path, path.stat().st_size - 1)
    assert on_ranks(2, lambda comm: open_checkpoint(run, comm, everything(comm.rank, 2)).state.step) == [1, 1]


def test_damaged_frozen_weights_are_named(run: Path) -> None:
    (folder,) = (run / "frozen").iterdir()
    path = folder / "rank-00000.safetensors"
    flip(path, path.stat().st_size - 1)
    with pytest.raises(WorkError, match=f"none of 2 checkpoints.*{folder.name}/rank-00000.safetensors: chunk 0"):
        open_checkpoint(run, fill=everything())
    shutil.rmtree(folder)
    with pytest.raises(WorkError, match="frozen"):
        open_checkpoint(run)


def test_no_checkpoint_is_an_input_error(tmp_path: Path) -> None:
    for call in (open_checkpoint, verify, info):
        with pytest.raises(InputError, match="no checkpoint"):
            call(tmp_path)
    assert checkpoints(tmp_path) == []


def test_names_and_shapes_are_strict(run: Path) -> None:
    checkpoint = open_checkpoint(run)
    with pytest.raises(WorkError, match="no tensor head"):
        checkpoint.read([LocalSlice("head", "param", TensorLayout((7,)), 0, torch.empty(7))])
    with pytest.raises(WorkError, match=r"norm.weight has shape \(7,\), the model wants \(8,\)"):
        checkpoint.read([LocalSlice("norm.weight", "param", TensorLayout((8,)), 0, torch.empty(8))])
    with pytest.raises(WorkError, match=r"encoder.weight \(exp_avg\)"):
        checkpoint.read_full("encoder.weight", "exp_avg")
    open_checkpoint(run, names=[*TENSORS, FROZEN[0]])
    with pytest.raises(WorkError, match=r"1 missing \['head'\], 1 unknown \['encoder.weight'\]"):
        open_checkpoint(run, names=[*TENSORS, "head"])


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    save(tmp_path, state(1), [LocalSlice("w", "param", TensorLayout((2,)), 0, torch.tensor([1, torch.nan]))], Alone())
    with pytest.raises(WorkError, match="not a number"):
        open_checkpoint(tmp_path).read_full("w")


def test_weights_without_moments_start_from_zero_moments(tmp_path: Path) -> None:
    weights = [LocalSlice("w", "param", TensorLayout((2,)), 0, torch.ones(2))]
    moment = LocalSlice("w", "exp_avg", TensorLayout((2,)), 0, torch.ones(2))
    save(tmp_path, state(0), weights, Alone())
    open_checkpoint(tmp_path, fill=[moment])
    assert torch.equal(moment.tensor, torch.zeros(2))
    save(tmp_path, state(1), weights, Alone())
    with pytest.raises(WorkError, match="exp_avg"):
        open_checkpoint(checkpoints(tmp_path)[0], fill=[moment])


def test_only_the_chunks_needed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CHUNK", 1024)
    rows, columns, data = 64, 96, 4
    shape = (rows, columns)

    def held(rank: int, data: int, tensor: int) -> LocalSlice:
        cut = TensorLayout(shape) if tensor == 1 else TensorLayout.sharded(shape, 0, [rows], rank % tensor, tensor)
        n = cut.local_numel // data
        start = rank // tensor * n
        return LocalSlice("w", "param", cut, start, torch.arange(rows * columns).float()[start : start + n])

    on_ranks(data, lambda comm: save(tmp_path, state(1), [held(comm.rank, data, 1)], comm))
    for rank in range(4):
        checkpoint = open_checkpoint(tmp_path)
        before = checkpoint.bytes_read
        wanted = held(rank, 2, 2)
        checkpoint.read([wanted])
        need = 4 * wanted.length
        assert need <= checkpoint.bytes_read - before <= need + 4 * 1024  # at most a chunk more at each end of two files


def test_info(run: Path) -> None:
    summary = info(run)
    trained = sum(torch.Size(shape).numel() for shape, _, _ in TENSORS.values())
    assert (summary.step, summary.samples, summary.tensors, summary.parameters) == (2, 16, len(TENSORS) + 1, trained + 36)
    assert sum(part.parameters for part in summary.parts) == summary.parameters
    assert {part.name: part.frozen for part in summary.parts}["encoder.weight"] == 36
    assert verify(run).faults == []
    assert verify(run).checkpoints == 2
    assert Checkpoint(checkpoints(run)[0]).kinds("encoder.weight") == ["param"]
    assert Checkpoint(checkpoints(run)[0]).kinds("scale") == ["param", "exp_avg", "exp_avg_sq"]


def test_nothing_is_unpickled() -> None:
    """The files' code imports no pickle, and calls neither torch.load nor numpy's load."""
    for path in Path(inspect.getfile(package)).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not any("pickle" in alias.name for alias in node.names)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("np", "load"), ("torch", "save")}
