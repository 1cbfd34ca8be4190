"""Adds what omni conversations need to a Hugging Face tokenizer: special tokens, a chat template, a padded vocabulary."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_omni.data.tokenizer import TokenizerSummary, prepare_tokenizer
from megatron_omni.runtime import cli


def main(
    base: Annotated[str, typer.Option(help="tokenizer to start from: a folder or a Hub id")],
    out: Annotated[Path, typer.Option(help="folder to write")],
) -> TokenizerSummary:
    """Makes a tokenizer ready for omni training."""
    return prepare_tokenizer(base, out)


if __name__ == "__main__":
    cli.command(main)
