"""The tool as a user runs it: on shards made from a folder of recordings, with a tokenizer that was prepared."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.data.building.builder import build_shards
from megatron_omni.data.rows.materialize import MaterializedRows
from megatron_omni.data.rows.pack import RowSettings, plan_rows
from megatron_omni.data.rows.saved import SavedPlan
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.tokenizer import OmniTokenizer, prepare_tokenizer
from megatron_omni.demo.train_tokenizer import train_bpe
from megatron_omni.schema import RowShape

ROOT = Path(__file__).parents[2]
WORDS = ["one", "two", "three", "four", "five"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``shards`` of 30 short clips and ``tokenizer``."""
    folder = tmp_path_factory.mktemp("pack")
    random = np.random.default_rng(0)
    with open(folder / "manifest.jsonl", "w") as manifest:
        for number in range(30):
            wave = 0.1 * random.standard_normal(int(random.integers(2000, 12000)))
            soundfile.write(folder / f"{number}.wav", wave, 16000)
            text = " ".join(random.choice(WORDS, random.integers(1, 5)))
            manifest.write(json.dumps({"id": f"utt{number}", "audio": f"{number}.wav", "text": text, "task": "transcribe"}) + "\n")
    build_shards(folder / "manifest.jsonl", folder / "shards", None, samples_per_shard=10, workers=0)
    train_bpe([" ".join(WORDS)], folder / "base", 700)
    prepare_tokenizer(folder / "base", folder / "tokenizer")
    return folder


def pack(made: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    given = ["--shards", str(made / "shards"), "--tokenizer", str(made / "tokenizer"), "--out", str(out), *options]
    return subprocess.run([sys.executable, "tools/pack_sequences.py", *given], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_writes_the_plan_that_the_stream_computes(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = pack(
        made, tmp_path / "plan", "--seq-len", "96", "--codec-len", "8", "--encoder-len", "320", "--epoch", "2", "--seed", "7", "--json"
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    shape = RowShape(seq=96, codec=8, encoder=320, spoken=96, supervised=128)
    data, tokenizer = ShardedDataset.open([made / "shards"]), OmniTokenizer.load(made / "tokenizer")
    planned = plan_rows(data, tokenizer, RowSettings(EncoderGeometry(160, (1, 2), 4), shape, 0, seed=7))
    saved = SavedPlan.load(tmp_path / "plan", planned.fingerprint, planned.plan)
    table = planned.selection.demands.table
    lazy = planned.plan.window(2)
    assert saved.first == 2 and len(saved.windows) == 2
    assert [row.tolist() for row in saved.window(2)] == [row.tolist() for row in lazy]
    assert summary["samples"] == 30
    assert summary["rows"] == len(lazy)
    assert summary["fill"]["tokens"] == pytest.approx(table[:, 0].sum() / (96 * len(lazy)))
    assert summary["fill"]["binding"] == max(summary["fill"][name] for name in ("tokens", "codec", "encoder"))


def test_a_sample_that_fits_no_row_is_named(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = pack(made, tmp_path / "plan", "--seq-len", "96", "--codec-len", "8", "--encoder-len", "16")
    assert done.returncode == 2
    assert "utt" in done.stderr and "encoder" in done.stderr and "enlarge the row" in done.stderr
    assert not (tmp_path / "plan").exists()
    dropped = pack(
        made, tmp_path / "plan", "--seq-len", "96", "--codec-len", "8", "--encoder-len", "16", "--long-samples", "drop", "--json"
    )
    assert dropped.returncode == 0, dropped.stderr
    summary = json.loads(dropped.stdout)
    names = (tmp_path / "plan" / "long_samples.txt").read_text().splitlines()
    assert 0 < summary["dropped"] == len(names) == 30 - summary["samples"]
    assert all(name.startswith("utt") for name in names)


def test_a_recipe_gives_the_rows_of_its_run_materialized(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    overrides = [
        f"data.train=[{made / 'shards'}]",
        f"data.tokenizer={made / 'tokenizer'}",
        "data.mixture.tasks.transcribe=2",
        "row={seq: 96, codec: 8, encoder: 320, spoken: 96, supervised: 128}",
    ]
    command = [sys.executable, "tools/pack_sequences.py", "--config", "launch/recipes/demo_cpu.yaml", "--out", str(tmp_path / "rows")]
    options = ["--materialize", "--epochs", "2", "--json"]
    done = subprocess.run([*command, *overrides, *options], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["samples"] == 120 and summary["epochs"] == 2
    assert [(share["passes"], share["tokens"]) for share in summary["mixture"]] == [(2.0, 1.0)]
    rows = MaterializedRows(tmp_path / "rows")
    assert len(rows) == 120 and len(list((tmp_path / "rows").glob("*.tar"))) == 1
    assert Counter(rows.sample(number).id for number in range(120)) == Counter({f"utt{number}": 4 for number in range(30)})

    command = [sys.executable, "tools/show_rows.py", "--config", "launch/recipes/demo_cpu.yaml", "--rows", "2", "--json"]
    command += [*overrides, f"data.plan={tmp_path / 'rows'}", "--html", str(tmp_path / "rows.html")]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    first, second = rows.window(0)[:2]
    assert json.loads(shown.stdout)["samples"] == len(first) + len(second)
    page = (tmp_path / "rows.html").read_text()
    assert all(rows.sample(number).id in page for number in [*first.tolist(), *second.tolist()])


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/pack_sequences.py", "--out", str(tmp_path / "plan")], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "give --config, or all of --shards" in done.stderr
