"""Builds WebDataset shards with Mimi codes from any collection of recordings. Killed and started again, it goes on."""

from typing import Annotated

import typer

from megatron_omni.audio.codec import Backend, Precision
from megatron_omni.data.building.builder import Engine, build_shards
from megatron_omni.data.building.codec_choice import CodecChoice
from megatron_omni.data.building.finish import BuildSummary
from megatron_omni.data.building.gate import Gate
from megatron_omni.data.building.options import Decoder
from megatron_omni.data.sources.open import Kind, open_source
from megatron_omni.runtime import cli
from megatron_omni.runtime.errors import InputError
from megatron_omni.schema import Task


def main(
    manifest: Annotated[str, typer.Option(help="manifest, folder, tars, parquet, saved data set, URL, or a name on the Hugging Face Hub")],
    out: Annotated[str, typer.Option(help="folder or URL to write")],
    kind: Annotated[Kind, typer.Option(help="what --manifest is; nemo and lhotse have to be named")] = "auto",
    columns: Annotated[str | None, typer.Option(help="YAML that maps columns, or a preset: ami, heysquad, sift, ...")] = None,
    task: Annotated[Task | None, typer.Option(help="of all samples, instead of the columns' own")] = None,
    split: Annotated[str | None, typer.Option(help="of a Hugging Face data set")] = None,
    streaming: Annotated[bool, typer.Option(help="read a data set of the Hub from its parquet files without downloading it first")] = False,
    codec: Annotated[str | None, typer.Option(help="Mimi: a folder or a Hub id; not needed without speech to learn")] = None,
    codec_backend: Annotated[Backend, typer.Option(help="whose implementation encodes; the codes are the same")] = "transformers",
    num_codebooks: Annotated[int | None, typer.Option(help="keep the first K codebooks; by default all")] = None,
    device: Annotated[str, typer.Option(help="where the codec runs: cpu, cuda, or several parted by commas: cuda:0,cuda:1")] = "cpu",
    dtype: Annotated[
        Precision, typer.Option(help="of the codec's arithmetic; less than float32 changes codes, and says how many")
    ] = "float32",
    codec_threads: Annotated[int, typer.Option(min=1, help="of the codec on a CPU; recorded, since it can turn ties round")] = 1,
    samples_per_shard: Annotated[int, typer.Option(help="lines of the manifest that make one tar")] = 1000,
    workers: Annotated[int, typer.Option(help="processes that decode audio; 0: none but this one")] = 1,
    engine: Annotated[Engine, typer.Option(help="this machine, or a Ray cluster (RAY_ADDRESS)")] = "local",
    part: Annotated[str | None, typer.Option(help="i/n: build every nth shard from the ith, as in a Slurm array; then --finalize")] = None,
    finalize: Annotated[bool, typer.Option(help="merge what all parts have built")] = False,
    decoder: Annotated[Decoder, typer.Option(help="ffmpeg: for formats that soundfile cannot read")] = "soundfile",
    gate: Annotated[list[str], typer.Option(help="RULE=reject|warn|off[:LIMIT], such as silent=warn:-50; repeat for several")] = [],  # noqa: B006
    max_reject_rate: Annotated[float, typer.Option(help="exit with 1 if a larger share of the lines is rejected")] = 0.05,
) -> BuildSummary:
    """Builds shards; rejected lines and warnings are listed in OUT/rejects.jsonl."""
    choice = None
    if codec is not None:
        choice = CodecChoice(codec, codec_backend, num_codebooks, tuple(device.split(",")), dtype, codec_threads)
    return build_shards(
        open_source(manifest, kind, columns, task, split, streaming),
        out,
        choice,
        samples_per_shard,
        workers,
        Gate().changed(gate),
        decoder,
        engine,
        _part(part),
        finalize,
        max_reject_rate,
    )


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise InputError(f"--part {text!r}: expected i/n, such as 1/8")
    return int(number), int(count)


if __name__ == "__main__":
    cli.command(main)
