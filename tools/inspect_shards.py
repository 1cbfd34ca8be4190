"""Shows what shards hold: totals, lengths per task, the entropy of each codebook, and a page with samples to hear."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_omni.audio.codec import load_codec
from megatron_omni.data.shards.inspect import InspectSummary, inspect_shards
from megatron_omni.runtime import cli


def main(
    folder: Annotated[Path, typer.Argument(help="folder of a finished data set")],
    html: Annotated[Path | None, typer.Option(help="page to write, with histograms and samples to hear")] = None,
    codec: Annotated[str | None, typer.Option(help="Mimi, to hear the codes on the page")] = None,
    samples: Annotated[int, typer.Option(min=0, help="samples on the page")] = 8,
) -> InspectSummary:
    """Inspects FOLDER."""
    return inspect_shards(folder, html, None if codec is None else load_codec(codec), samples)


if __name__ == "__main__":
    cli.command(main)
