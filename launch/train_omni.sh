#!/usr/bin/env bash
''''true
# Valid shell and valid Python. As a shell script it starts DeepSpeed's launcher with itself, which starts one Python
# per device with this file; so `bash launch/train_omni.sh ...` and `deepspeed launch/train_omni.sh ...` are the same.
# NUM_GPUS=2 is the launcher's --num_gpus 2; on a machine without GPUs it is the number of CPU processes.
here="$(cd "$(dirname "$0")" && pwd)"
PATH="$PATH:$here/../.venv/bin" exec deepspeed ${NUM_GPUS:+--num_gpus "$NUM_GPUS"} "$here/train_omni.sh" "$@"
'''

from pathlib import Path
from typing import Annotated

import typer

from megatron_omni.runtime import cli
from megatron_omni.runtime.world import World
from megatron_omni.train.main import main


def train(
    config: Annotated[Path, typer.Option(help="Recipe (YAML), such as launch/recipes/demo_cpu.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to change: optim.lr=3e-4")] = None,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="From the launcher, which also exports it.")] = 0,
) -> object:
    """Trains the model that the recipe describes, or continues the run in its directory."""
    summary = main(config, overrides or [])
    return summary if World.from_environment().is_first else None


if __name__ == "__main__":
    cli.command(train)
