"""The tool as a person starts it: one JSON object with its keys, a page, exit codes."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from megatron_omni.data.building.builder import build_shards
from tests.data.corpus import K, make_corpus, save_tiny_mimi
from tests.tools.test_make_shards import start


def test_prints_json_and_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codec, page = save_tiny_mimi(tmp_path / "codec"), tmp_path / "page.html"
    build_shards(make_corpus(tmp_path)[0], tmp_path / "out", codec, workers=0)
    capsys.readouterr()
    assert start("inspect_shards", tmp_path / "out", "--html", page, "--codec", codec, "--samples", 2, "--json") == 0
    summary = orjson.loads(capsys.readouterr().out)
    assert summary["hours"] > 0 and len(summary["entropy"]) == K and "transcribe" in summary["tasks"]
    assert "<audio" in page.read_text()

    assert start("inspect_shards", tmp_path / "out", "--codec", save_tiny_mimi(tmp_path / "other", seed=1)) == 2
    assert "give --codec codec" in capsys.readouterr().err
    assert start("inspect_shards", tmp_path / "nowhere") == 2
    assert "dataset.json: cannot be read" in capsys.readouterr().err.replace("\n", " ")
