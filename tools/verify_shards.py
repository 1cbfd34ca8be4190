"""Checks shards: hashes, the index against the tar, that every member decodes, codes in range, ids unique."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_omni.data.shards.verify import VerifySummary, verify_shards
from megatron_omni.runtime import cli


def main(folder: Annotated[Path, typer.Argument(help="folder that make_shards has written")]) -> VerifySummary:
    """Reads everything in FOLDER and lists its faults; exit code 1 if there are any."""
    return verify_shards(folder)


if __name__ == "__main__":
    cli.command(main)
