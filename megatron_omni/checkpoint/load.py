"""Loading: opens the newest good checkpoint, the same on all ranks, and fills slices of any topology from it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from pydantic import ValidationError

from megatron_omni.checkpoint.comm import Alone, Comm, on_first
from megatron_omni.checkpoint.save import COMPLETE, STATE, checkpoints
from megatron_omni.checkpoint.slices import KINDS, Kind, LocalSlice
from megatron_omni.checkpoint.state import CheckpointState
from megatron_omni.checkpoint.store import MANIFEST, Store
from megatron_omni.parallel.layout import TensorLayout
from megatron_omni.runtime import logs
from megatron_omni.runtime.errors import InputError, WorkError

NONE_HERE = "{}: no checkpoint here; give a run directory with checkpoints/step-..., or one checkpoint"

logger = logs.get_logger(__name__)


class Checkpoint:
    """An open checkpoint: its state, and its tensors by logical name. Reading checks every chunk it touches."""

    def __init__(self, path: Path, check_sizes: bool = True) -> None:
        """Raises ``WorkError`` that names the file if one is damaged, missing or of the wrong size."""
        self.path = path
        self._trained = Store(path)
        self.frozen = self._trained.manifest.frozen
        """Hash of the frozen weights that belong to it; pass it on to the next ``save``."""
        self._stores = [self._trained]
        if self.frozen is not None:
            self._stores.append(Store(path.absolute().parent.parent / "frozen" / self.frozen))
        if check_sizes:
            for store in self._stores:
                store.check_sizes()
        try:
            self.state = CheckpointState.model_validate_json(self._trained.content(STATE))
        except ValidationError as error:
            raise WorkError(f"{path / STATE}: {error}") from error

    def names(self) -> list[str]:
        """All tensors, frozen ones last."""
        return [name for store in self._stores for name in store.shapes]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._store(name).shapes[name]

    def is_frozen(self, name: str) -> bool:
        return self._store(name) is not self._trained

    def kinds(self, name: str) -> list[Kind]:
        """What is stored of a tensor: only ``param`` if it is frozen."""
        return [kind for kind in KINDS if self._store(name).pieces(name, kind)]

    def read(self, wanted: Sequence[LocalSlice]) -> None:
        """Fills the slices' tensors, reading only the chunks that hold their elements.

        Raises ``WorkError`` on an unknown name, another shape or damage; then some tensors hold NaN.
        """
        for store in self._stores:
            own = [piece for piece in wanted if self._store(piece.name) is store]
            for piece in own:
                if self._before_first_update(piece.kind):
                    piece.tensor.zero_()
            store.fill([piece for piece in own if not self._before_first_update(piece.kind)])

    def _before_first_update(self, kind: Kind) -> bool:
        """A first checkpoint, made from weights alone, has no moments yet: they are zero."""
        return kind != "param" and self.state.updates == 0 and not self._trained.has(kind)

    def read_full(self, name: str, kind: Kind = "param") -> torch.Tensor:
        """One whole logical tensor, float32, on the CPU."""
        shape = self.shape(name)
        tensor = torch.empty(math.prod(shape), dtype=torch.float32)
        self.read([LocalSlice(name, kind, TensorLayout(shape), 0, tensor)])
        return tensor.view(shape)

    def verify(self) -> list[str]:
        """Reads every byte and returns the faults, each naming its file; empty if all is well."""
        return [fault for store in self._stores for fault in store.faults()]

    @property
    def bytes_read(self) -> int:
        return sum(store.bytes_read for store in self._stores)

    def stores(self) -> list[Store]:
        return list(self._stores)

    def _store(self, name: str) -> Store:
        for store in self._stores:
            if name in store.shapes:
                return store
        raise WorkError(f"{self.path}: has no tensor {name}")


def open_checkpoint(
    path: Path, comm: Comm | None = None, fill: Sequence[LocalSlice] = (), names: Collection[str] | None = None
) -> Checkpoint:
    """Opens ``path``, a checkpoint or a run directory, and reads this rank's slices ``fill`` from it.

    Of a run the newest checkpoint is taken that every rank can open and read; damaged ones are passed over with a
    warning. All ranks call this together and get the same one. ``names``: what the stored tensors must be called, all
    of them and no others.
    Raises ``InputError`` if there is no checkpoint, ``WorkError`` if none is good.
    """
    comm = comm or Alone()
    found = on_first(comm, f"looking for checkpoints in {path}", lambda: candidates(path))
    if not found:
        raise InputError(NONE_HERE.format(path))
    failures: list[str] = []
    for candidate in found:
        checkpoint, failure = None, None
        try:
            checkpoint = Checkpoint(candidate, check_sizes=comm.rank == 0)
            if names is not None:
                _match(checkpoint, set(names))
            checkpoint.read(fill)
        except Exception as error:  # the others must hear of it, whatever it was
            failure = f"rank {comm.rank}: {error if isinstance(error, WorkError) else repr(error)}"
        heard = comm.gather(failure)
        failure = comm.broadcast(next(filter(None, heard), None) if heard else None)
        if failure is None:
            assert checkpoint is not None
            if failures:
                logger.warning("continuing from the older checkpoint %s", candidate)
            return checkpoint
        logger.warning("checkpoint %s cannot be used: %s", candidate, failure)
        failures.append(failure)
    raise WorkError(f"{path}: none of {len(failures)} checkpoints can be used: " + "; ".join(failures))


def candidates(path: Path) -> list[Path]:
    """``path`` itself if it is a checkpoint, else the checkpoints of the run directory ``path``, newest first."""
    is_checkpoint = (path / MANIFEST).is_file() or (path.is_dir() and COMPLETE.fullmatch(path.name))
    return [path] if is_checkpoint else checkpoints(path)


def _match(checkpoint: Checkpoint, wanted: set[str]) -> None:
    stored = set(checkpoint.names())
    if wanted != stored:
        missing, extra = sorted(wanted - stored), sorted(stored - wanted)
        raise WorkError(
            f"{checkpoint.path}: its tensors are not the model's: {len(missing)} missing {missing[:3]}, {len(extra)} unknown {extra[:3]}"
        )
