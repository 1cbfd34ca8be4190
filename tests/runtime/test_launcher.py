"""``launch/train_omni.sh`` is valid shell and valid Python, and both ways lead to DeepSpeed's launcher."""

import ast
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "train_omni.sh"


@pytest.mark.parametrize(("gpus", "first"), [(None, []), ("2", ["--num_gpus", "2"])])
def test_as_shell_it_starts_deepspeed_with_itself(tmp_path, gpus, first):
    fake = tmp_path / "deepspeed"
    fake.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key != "NUM_GPUS"}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    if gpus:
        environment["NUM_GPUS"] = gpus
    arguments = ["--config", "a recipe.yaml", "optim.lr=1"]
    done = subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [*first, str(SCRIPT), *arguments]


def test_as_python_it_calls_the_trainer():
    tree = ast.parse(SCRIPT.read_text())
    imported = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert "megatron_omni.train.main" in imported
