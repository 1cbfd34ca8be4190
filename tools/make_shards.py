"""Builds WebDataset shards with Mimi codes from a manifest of recordings. Killed and started again, it goes on."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_omni.data.building.builder import BuildSummary, build_shards
from megatron_omni.runtime import cli


def main(
    manifest: Annotated[Path, typer.Option(help="JSON lines: id, audio, text, task, ...; paths are relative to it")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    codec: Annotated[str | None, typer.Option(help="Mimi: a folder or a Hub id; not needed without speech to learn")] = None,
    num_codebooks: Annotated[int | None, typer.Option(help="keep the first K codebooks; by default all")] = None,
    samples_per_shard: Annotated[int, typer.Option(help="lines of the manifest that make one tar")] = 1000,
    workers: Annotated[int, typer.Option(help="processes that decode audio; 0: none but this one")] = 1,
    device: Annotated[str, typer.Option(help="where the codec runs: cpu, cuda, cuda:1, ...")] = "cpu",
    max_reject_rate: Annotated[float, typer.Option(help="exit with 1 if a larger share of the lines is rejected")] = 0.05,
) -> BuildSummary:
    """Builds shards; rejected lines are listed in OUT/rejects.jsonl."""
    return build_shards(manifest, out, codec, samples_per_shard, workers, num_codebooks, device, max_reject_rate)


if __name__ == "__main__":
    cli.command(main)
