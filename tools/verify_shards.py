"""Checks shards: hashes, the index against the tar, that every member decodes, codes in range, ids unique."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from megatron_omni.audio.codec import load_codec
from megatron_omni.data.building.reencode import reencode
from megatron_omni.data.shards.verify import VerifySummary, verify_shards
from megatron_omni.data.sources.open import Kind, open_source
from megatron_omni.runtime import cli
from megatron_omni.runtime.errors import InputError


@dataclass(frozen=True)
class Verified(VerifySummary):
    reencoded: int
    """Clips encoded again and compared."""
    ties: int
    """Their frames that differ by float rounding only."""


def main(
    folder: Annotated[Path, typer.Argument(help="folder that make_shards has written")],
    workers: Annotated[int, typer.Option(min=0, help="processes that read a shard each; 0: none but this one")] = 0,
    manifest: Annotated[str | None, typer.Option(help="what the shards were built from: a sample of its clips is encoded again")] = None,
    kind: Annotated[Kind, typer.Option(help="what --manifest is")] = "auto",
    columns: Annotated[str | None, typer.Option(help="as given to make_shards")] = None,
    codec: Annotated[str | None, typer.Option(help="as given to make_shards")] = None,
    sample: Annotated[int, typer.Option(min=1, help="clips to encode again")] = 20,
) -> Verified:
    """Reads everything in FOLDER and lists its faults; exit code 1 if there are any."""
    if (manifest is None) != (codec is None):
        raise InputError("--manifest and --codec go together: the recordings are in the one, what encodes them is the other")
    found = verify_shards(folder, workers)
    if manifest is None or codec is None or found.faults:
        return Verified(found.shards, found.samples, found.hours, found.faults, 0, 0)
    again = reencode(folder, open_source(manifest, kind, columns), load_codec(codec), sample)
    return Verified(found.shards, found.samples, found.hours, found.faults + again.faults, again.clips, again.ties)


if __name__ == "__main__":
    cli.command(main)
