"""Packs samples into training rows of fixed capacities and writes the plan; prints how full the rows are."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.data.rows.pack import PackSummary, write_plan
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.runtime import cli
from megatron_omni.runtime.errors import InputError
from megatron_omni.schema import RowShape


def main(
    shards: Annotated[list[Path], typer.Option(help="shard folder; repeat for several")],
    tokenizer: Annotated[Path, typer.Option(help="folder written by tools/prepare_tokenizer.py")],
    seq_len: Annotated[int, typer.Option(min=1, help="LLM positions of a row")],
    codec_len: Annotated[int, typer.Option(min=1, help="codec-decoder positions of a row")],
    encoder_len: Annotated[int, typer.Option(min=1, help="audio-encoder frames of a row, a multiple of --stack")],
    out: Annotated[Path, typer.Option(help="folder to write the plan to")],
    spoken_len: Annotated[int | None, typer.Option(min=1, help="spoken-text positions of a row; default: --seq-len")] = None,
    supervised_len: Annotated[int | None, typer.Option(min=1, help="supervised positions of a row; default: --seq-len, rounded up")] = None,
    hop_length: Annotated[int, typer.Option(min=1, help="wave samples per mel frame (Whisper's)")] = 160,
    conv_strides: Annotated[str, typer.Option(help="strides of the encoder's convolutions (Whisper's)")] = "1,2",
    stack: Annotated[int, typer.Option(min=1, help="encoder frames per embedding")] = 4,
    acoustic_delay: Annotated[int, typer.Option(min=0, help="frames by which codebooks 1.. lag codebook 0")] = 0,
    seed: Annotated[int, typer.Option(help="of the order of samples")] = 0,
    epoch: Annotated[int, typer.Option(min=0, help="the epoch to plan")] = 0,
) -> PackSummary:
    """Plans one epoch's rows."""
    try:
        strides = tuple(int(stride) for stride in conv_strides.split(","))
    except ValueError as error:
        raise InputError(f"--conv-strides {conv_strides!r}: expected integers parted by commas, such as 1,2") from error
    supervised = -(-(supervised_len or seq_len) // 128) * 128
    shape = RowShape(seq_len, codec_len, encoder_len, spoken_len or seq_len, supervised)
    return write_plan(
        ShardedDataset.open(shards),
        OmniTokenizer.load(tokenizer),
        EncoderGeometry(hop_length, strides, stack),
        shape,
        acoustic_delay,
        seed,
        epoch,
        out,
    )


if __name__ == "__main__":
    cli.command(main)
