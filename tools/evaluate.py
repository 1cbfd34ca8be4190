"""Scores an exported model on shards: word error rate and exact match by task, codec losses beside their entropies."""

from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_omni.evaluate.run import evaluate
from megatron_omni.runtime import cli


def main(
    model: Annotated[Path, typer.Option(help="Exported model: a folder that convert_checkpoint.py to-hf wrote.")],
    shards: Annotated[list[Path], typer.Option(help="Data set to score on; give it again for more.")],
    report: Annotated[Path | None, typer.Option(help="JSON file to write, with every answer; waves go beside it.")] = None,
    by: Annotated[list[str] | None, typer.Option(help="Attribute of samples to score apart, such as speaker; repeatable.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Conversations answered at once.")] = 64,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Score so many, evenly spaced; all by default.")] = None,
    speech_samples: Annotated[int, typer.Option(min=0, help="Speeches to record for the report.")] = 6,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, ...")] = "cpu",
) -> dict[str, Any]:
    """Scores a model on held-out shards."""
    return evaluate(model, shards, report, batch_size, max_samples, speech_samples, by or (), device).to_json()


if __name__ == "__main__":
    cli.command(main)
