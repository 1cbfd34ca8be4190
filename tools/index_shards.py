"""Makes a data set of WebDataset tars that others wrote: an index beside each, nothing written again."""

import glob
from pathlib import Path
from typing import Annotated

import typer

from megatron_omni.audio.codec import load_codec
from megatron_omni.data.building.finish import BuildSummary
from megatron_omni.data.building.index_tars import index_tars
from megatron_omni.data.shards.info import CodecProvenance
from megatron_omni.data.sources.columns import load_columns
from megatron_omni.runtime import cli
from megatron_omni.runtime.errors import InputError
from megatron_omni.schema import Task


def main(
    tars: Annotated[list[str], typer.Argument(help="tars, folders or quoted patterns of them")],
    columns: Annotated[str, typer.Option(help="YAML that maps members and JSON keys, or a preset")] = "webdataset",
    task: Annotated[Task | None, typer.Option(help="of all samples, instead of the columns' own")] = None,
    codec: Annotated[str | None, typer.Option(help="Mimi that made the codes in the tars, if there are any")] = None,
    num_codebooks: Annotated[int | None, typer.Option(help="of those codes; by default all of the codec's")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for what is written and links to the tars; by default beside them")] = None,
    workers: Annotated[int, typer.Option(min=0, help="processes that read a tar each; 0: none but this one")] = 0,
) -> BuildSummary:
    """Indexes TARS; samples that cannot be read are listed in rejects.jsonl."""
    found = [Path(name) for given in tars for name in sorted(glob.glob(f"{given}/*.tar" if Path(given).is_dir() else given))]
    if not found:
        raise InputError(f"{' '.join(tars)}: no tar lies there")
    mapping = load_columns(columns)
    provenance = None
    if codec is not None:
        name = Path(codec).name if Path(codec).is_dir() else codec
        provenance = CodecProvenance(name=name, **load_codec(codec, num_codebooks=num_codebooks).config().model_dump())
    return index_tars(found, mapping if task is None else mapping.model_copy(update={"task": task}), provenance, out, workers)


if __name__ == "__main__":
    cli.command(main)
