"""Saving: every rank writes its own slices; a checkpoint appears under its final name complete, or not at all."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_omni.checkpoint.comm import Comm, on_all, on_first
from megatron_omni.checkpoint.slices import LocalSlice
from megatron_omni.checkpoint.state import CheckpointState
from megatron_omni.checkpoint.store import MANIFEST, Claim, FileRecord, Manifest, seal, unseal, write_bytes, write_index, write_slices
from megatron_omni.runtime import logs
from megatron_omni.runtime.errors import OmniError, WorkError
from megatron_omni.runtime.files import atomic_write, fsync_directory

STATE = "state.json"
COMPLETE = re.compile(r"step-(\d{8,})(\.replaced)?")
"""Names of complete checkpoints. ``.replaced`` was moved aside by a second save of its step that did not finish."""
PARTIAL = re.compile(r".+\.tmp-[0-9a-f]{8}")

logger = logs.get_logger(__name__)


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run directory, newest first; empty if there is none."""
    found = [(int(match[1]), not match[2], path) for path in _folder(run).glob("step-*") if (match := COMPLETE.fullmatch(path.name))]
    return [path for _, _, path in sorted(found, reverse=True)]


def save(
    run: Path,
    state: CheckpointState,
    slices: Sequence[LocalSlice],
    comm: Comm,
    frozen: str | None = None,
    keep_last: int | None = None,
) -> Path:
    """Saves ``RUN/checkpoints/step-<state.step>``; called by all ranks together, on a file system that they share.

    ``slices`` are this rank's masters and moments; what several ranks hold is written once. ``frozen`` names the store
    that ``save_frozen`` made. Of the run's checkpoints the ``keep_last`` newest stay.
    A failure on any rank is a ``WorkError`` on all ranks, and leaves what was there before.
    """
    final = _folder(run) / f"step-{state.step:08d}"
    extra = {STATE: state.model_dump_json(indent=1).encode()}
    partial = _write(final, slices, extra, comm, frozen)
    on_first(comm, f"finishing {final}", lambda: _commit(partial, final))
    if comm.rank == 0:
        try:
            atomic_write(_folder(run) / "latest", final.name + "\n")
            if keep_last is not None:
                _retain(run, keep_last)
        except (OSError, OmniError) as error:  # the checkpoint is complete: this must not cost the run
            logger.warning("%s is saved, but tidying up failed: %s", final, error)
    comm.barrier()
    return final


def save_frozen(run: Path, slices: Sequence[LocalSlice], comm: Comm) -> str | None:
    """Saves the weights that do not train, once per run, as ``RUN/frozen/<hash>``; returns the hash, None without any.

    A run that continues from a checkpoint keeps that checkpoint's ``frozen`` instead of calling this.
    """
    if not on_first(comm, "saving frozen weights", lambda: bool(slices)):
        return None
    partial = _write(run / "frozen" / "weights", slices, {}, comm, None)

    def name_it() -> str:
        name = unseal(partial / MANIFEST).digest[:16]
        if (run / "frozen" / name).exists():
            shutil.rmtree(partial)
        else:
            _commit(partial, run / "frozen" / name)
        return name

    return on_first(comm, f"finishing {run / 'frozen'}", name_it)


def _folder(run: Path) -> Path:
    return run / "checkpoints"


def _write(final: Path, slices: Sequence[LocalSlice], extra: dict[str, bytes], comm: Comm, frozen: str | None) -> Path:
    """Writes a whole store, synced, under a temporary name beside ``final``; returns that name on every rank."""
    doing = f"saving {final}"
    claims = on_all(comm, doing, lambda: [Claim.of(piece) for piece in slices])

    def prepare() -> tuple[Path, list[set[int]]]:
        assert claims is not None
        if not any(claims):
            raise WorkError("there is nothing to save")
        skips = share_out(claims)
        final.parent.mkdir(parents=True, exist_ok=True)
        _sweep(final.parent)
        partial = final.with_name(f"{final.name}.tmp-{secrets.token_hex(4)}")
        partial.mkdir()
        return partial, skips

    partial, skips = on_first(comm, doing, prepare)
    mine = [piece for i, piece in enumerate(slices) if i not in skips[comm.rank]]
    file = f"rank-{comm.rank:05d}.safetensors"
    try:
        written = on_all(comm, doing, lambda: write_slices(partial / file, mine) if mine else None)

        def finish() -> None:
            assert claims is not None and written is not None
            records: dict[str, FileRecord] = {}
            pieces = {}
            for rank, result in enumerate(written):
                if result is not None:
                    name = f"rank-{rank:05d}.safetensors"
                    records[name], offsets = result
                    if not (partial / name).is_file():
                        raise WorkError(f"{partial / name}: rank {rank} wrote it, rank 0 does not see it; the run directory must be shared")
                    pieces[name] = list(zip((c for i, c in enumerate(claims[rank]) if i not in skips[rank]), offsets, strict=True))
            records |= write_index(partial, pieces)
            records |= {name: write_bytes(partial / name, content) for name, content in extra.items()}
            fsync_directory(partial)
            write_bytes(partial / MANIFEST, seal(Manifest(frozen=frozen, files=records)))
            fsync_directory(partial)

        on_first(comm, doing, finish)
    except WorkError:
        if comm.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return partial


def share_out(claims: Sequence[Sequence[Claim]]) -> list[set[int]]:
    """For each rank, which of its claims others write: what several ranks hold goes to the one with least to write."""
    holders: dict[tuple[object, ...], list[tuple[int, int]]] = {}
    for rank, own in enumerate(claims):
        for i, claim in enumerate(own):
            key = (claim.name, claim.kind, claim.layout.dim, claim.layout.segments, claim.start, claim.length)
            holders.setdefault(key, []).append((rank, i))
    load = [0] * len(claims)
    skips: list[set[int]] = [set() for _ in claims]
    for places in sorted(holders.values(), key=len):
        writer, first = min(places, key=lambda place: load[place[0]])
        load[writer] += claims[writer][first].num_bytes
        for rank, i in places:
            if (rank, i) != (writer, first):
                skips[rank].add(i)
    return skips


def _commit(partial: Path, final: Path) -> None:
    """Gives a complete store its final name. A store that has it already stays loadable until then."""
    aside = final.with_name(f"{final.name}.replaced")
    if final.exists():
        if aside.exists():
            _remove(aside)
        os.rename(final, aside)
    os.rename(partial, final)
    fsync_directory(final.parent)
    if aside.exists():
        _remove(aside)


def _remove(folder: Path) -> None:
    """Deletes a store such that a half-deleted one is never taken for a complete one."""
    doomed = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(4)}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _sweep(folder: Path) -> None:
    """Removes what killed saves left."""
    for path in folder.iterdir():
        if PARTIAL.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _retain(run: Path, keep_last: int) -> None:
    """Removes all but the newest checkpoints, then the frozen weights that none of those refers to."""
    if keep_last < 1:
        raise WorkError(f"keep_last={keep_last}: at least the newest checkpoint must stay")
    kept, old = checkpoints(run)[:keep_last], checkpoints(run)[keep_last:]
    for path in old:
        _remove(path)
    used = {unseal(path / MANIFEST).frozen for path in kept}  # an unreadable manifest stops here: better too much than too little
    for path in (run / "frozen").glob("*"):
        if path.name not in used:
            _remove(path)
