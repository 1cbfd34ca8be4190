"""Checkpoints to the Hugging Face format, and what a checkpoint holds."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_omni.checkpoint import inspect
from megatron_omni.export import to_hf as exporter
from megatron_omni.export import verify as verifier
from megatron_omni.runtime import cli

Source = Annotated[Path, typer.Argument(help="run directory (its newest good checkpoint) or checkpoint")]


def to_hf(
    checkpoint: Source,
    out: Annotated[Path, typer.Argument(help="directory to write; it must not exist")],
    codec: Annotated[str, typer.Option(help="codec that made the training targets: a folder or a Hub id")],
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer folder; default: where the run's recipe says")] = None,
    dtype: Annotated[exporter.Dtype, typer.Option(help="of the stored weights")] = "float32",
) -> verifier.Verified:
    """Writes a Hugging Face directory, reloads it and compares it with the checkpoint."""
    return exporter.to_hf(checkpoint, out, codec, tokenizer, dtype)


def verify(
    checkpoint: Source,
    out: Annotated[Path | None, typer.Argument(help="exported directory to compare with it; without: check the hashes")] = None,
) -> verifier.Verified | inspect.Verified:
    """Compares an exported directory with its checkpoint, or reads every byte of a checkpoint against its hashes."""
    return inspect.verify(checkpoint) if out is None else verifier.verify(checkpoint, out)


def info(checkpoint: Source, depth: Annotated[int, typer.Option(help="components of the names to group by")] = 2) -> inspect.Info:
    """Shows the parts of a checkpoint, their sizes and who wrote it."""
    return inspect.info(checkpoint, depth)


if __name__ == "__main__":
    cli.command(to_hf, verify, info)
