"""The two shard tools as a person starts them: summaries, exit codes, messages."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from unittest import mock

import orjson
import pytest

from tests.data.corpus import flip_bit, make_corpus, save_tiny_mimi, write_manifest


def start(tool: str, *arguments: object) -> int:
    """Runs the tool in this process; returns its exit code."""
    with mock.patch.object(sys, "argv", [tool, *map(str, arguments)]), pytest.raises(SystemExit) as end:
        runpy.run_path(f"tools/{tool}.py", run_name="__main__")
    return int(end.value.code or 0)


def test_make_then_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codec = save_tiny_mimi(tmp_path / "codec")
    manifest, lines = make_corpus(tmp_path / "corpus", 5)
    out = tmp_path / "out"
    make = ("make_shards", "--manifest", manifest, "--out", out, "--codec", codec, "--workers", 0, "--json")
    assert start(*make) == 0
    summary = orjson.loads(capsys.readouterr().out)
    assert (summary["samples"], summary["rejected"], summary["shards"]) == (5, 0, 1) and summary["hours"] > 0
    info = orjson.loads((out / "dataset.json").read_bytes())
    assert info["codec"]["name"] == "codec" and str(tmp_path) not in (out / "dataset.json").read_text()

    assert start("verify_shards", out, "--json") == 0
    assert orjson.loads(capsys.readouterr().out)["faults"] == []
    flip_bit(out / "shard-000000.tar", 700)
    assert start("verify_shards", out, "--json") == 1
    assert orjson.loads(capsys.readouterr().out)["faults"]

    (tmp_path / "corpus" / lines[0]["audio"]).unlink()
    assert start(*make) == 1
    assert orjson.loads(capsys.readouterr().out)["rejected"] == 1
    write_manifest(manifest, [lines[1], lines[1]])
    assert start(*make) == 2
    assert f"{manifest}:2: id 'utt-1'" in capsys.readouterr().err
