"""Packs samples into training rows of fixed capacities and writes the plan, or the rows; prints how full they are."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.config.load import load_recipe
from megatron_omni.data.rows.pack import PackSummary, RowSettings, plan_rows, write_rows
from megatron_omni.data.rows.selection import LongSamples
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.runtime import cli
from megatron_omni.runtime.errors import InputError
from megatron_omni.schema import RowShape


def main(
    out: Annotated[Path, typer.Option(help="folder to write to; the recipe's data.plan")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value changes to --config")] = None,
    config: Annotated[Path | None, typer.Option(help="recipe of the run: gives all below but --epoch and --epochs")] = None,
    shards: Annotated[list[Path] | None, typer.Option(help="shard folder; repeat for several")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="folder written by tools/prepare_tokenizer.py")] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="LLM positions of a row")] = None,
    codec_len: Annotated[int | None, typer.Option(min=1, help="codec-decoder positions of a row")] = None,
    encoder_len: Annotated[int | None, typer.Option(min=1, help="audio-encoder frames of a row, a multiple of --stack")] = None,
    spoken_len: Annotated[int | None, typer.Option(min=1, help="spoken-text positions of a row; default: --seq-len")] = None,
    supervised_len: Annotated[int | None, typer.Option(min=1, help="supervised positions of a row; default: --seq-len, rounded up")] = None,
    hop_length: Annotated[int, typer.Option(min=1, help="wave samples per mel frame (Whisper's)")] = 160,
    conv_strides: Annotated[str, typer.Option(help="strides of the encoder's convolutions (Whisper's)")] = "1,2",
    stack: Annotated[int, typer.Option(min=1, help="encoder frames per embedding")] = 4,
    acoustic_delay: Annotated[int, typer.Option(min=0, help="frames by which codebooks 1.. lag codebook 0")] = 0,
    seed: Annotated[int, typer.Option(help="of the order of samples")] = 0,
    long_samples: Annotated[LongSamples, typer.Option(help="those that no row holds")] = "refuse",
    epoch: Annotated[int, typer.Option(min=0, help="the first epoch to plan")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="how many")] = 1,
    materialize: Annotated[bool, typer.Option(help="write packed shards: one tar sample per row, audio and codes with it")] = False,
) -> PackSummary:
    """Plans the rows of some epochs. Mixtures are the recipe's: give --config."""
    if config is not None:
        if shards or tokenizer or seq_len or codec_len or encoder_len or spoken_len or supervised_len:
            raise InputError("--config gives shards, tokenizer and row: change them by key=value, not by options")
        recipe = load_recipe(config, overrides or [])
        folders, tokens, settings = list(recipe.data.train), recipe.data.tokenizer, RowSettings.of(recipe)
    else:
        if not shards or tokenizer is None or seq_len is None or codec_len is None or encoder_len is None:
            raise InputError("give --config, or all of --shards, --tokenizer, --seq-len, --codec-len and --encoder-len")
        supervised = -(-(supervised_len or seq_len) // 128) * 128
        shape = RowShape(seq_len, codec_len, encoder_len, spoken_len or seq_len, supervised)
        geometry = EncoderGeometry(hop_length, _strides(conv_strides), stack)
        folders, tokens, settings = shards, tokenizer, RowSettings(geometry, shape, acoustic_delay, seed, long_samples)
    planned = plan_rows(ShardedDataset.open(folders), OmniTokenizer.load(tokens), settings)
    return write_rows(planned, range(epoch, epoch + epochs), out, materialize)


def _strides(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(stride) for stride in text.split(","))
    except ValueError as error:
        raise InputError(f"--conv-strides {text!r}: expected integers parted by commas, such as 1,2") from error


if __name__ == "__main__":
    cli.command(main)
