"""Tools run as a user runs them: exit codes, ``--json``, streams."""

import json
import subprocess
import sys

import pytest

TOOL = '''
from __future__ import annotations
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
import typer
from megatron_omni.runtime import cli
from megatron_omni.runtime.errors import InputError, WorkError

@dataclass(frozen=True)
class Summary:
    samples: int
    fill: dict[str, float]
    faults: list[str]

def make(manifest: Annotated[Path, typer.Option(help="JSON lines")], times: int = 1) -> Summary:
    """Makes a thing."""
    if manifest.name == "missing":
        raise InputError("manifest [missing] does not exist")
    if manifest.name == "broken":
        raise WorkError("the disk is full")
    if manifest.name == "noisy":
        print("a library prints")
        subprocess.run(["echo", "a program prints"])
    n = sum(1 for _ in cli.progress(range(times), "making"))
    return Summary(n, {"tokens": 0.5}, ["bad"] if manifest.name == "faulty" else [])

cli.command(make)
'''


@pytest.fixture(scope="module")
def tool(tmp_path_factory):
    path = tmp_path_factory.mktemp("tool") / "tool.py"
    path.write_text(TOOL)

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(path), *args], capture_output=True, text=True, timeout=60, check=False)

    return run


def test_json_is_one_object_on_standard_output(tool):
    done = tool("--manifest", "m.jsonl", "--times", "3", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"samples": 3, "fill": {"tokens": 0.5}, "faults": []}


def test_what_others_print_does_not_spoil_the_summary(tool):
    done = tool("--manifest", "noisy", "--json")
    assert json.loads(done.stdout)["samples"] == 1
    assert "a library prints" in done.stderr and "a program prints" in done.stderr


def test_table_flattens_nested_keys(tool):
    done = tool("--manifest", "m.jsonl")
    assert "fill.tokens" in done.stdout
    assert "0.5" in done.stdout


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("--manifest", "missing"), 2, "manifest [missing] does not exist"),
        (("--manifest", "broken"), 1, "the disk is full"),
        (("--manifest", "faulty"), 1, ""),
        ((), 2, "--manifest"),
    ],
)
def test_exit_codes(tool, args, code, said):
    done = tool(*args)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_json(tool):
    assert "--json" in tool("--help").stdout
