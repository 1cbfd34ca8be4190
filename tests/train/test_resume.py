"""A killed run goes on as if it had never stopped: through the real launcher, on the same ranks and on others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_omni.checkpoint.load import open_checkpoint
from megatron_omni.data.building.builder import build_shards
from megatron_omni.data.tokenizer import prepare_tokenizer
from megatron_omni.demo.run import exact_losses, last_step, launch, train_and_kill
from megatron_omni.demo.train_tokenizer import train_bpe
from megatron_omni.runtime.run_directory import RunDirectory
from tests.data.corpus import make_corpus, save_tiny_mimi
from tests.factories import WORDS, model_config

STEPS, SAVED, KILLED = 12, 5, 8
"""Saved after every 5 steps, killed when step 8 (counted from 0) is logged."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 40 recordings of all kinds and a recipe for it."""
    root = tmp_path_factory.mktemp("resume")
    manifest, _ = make_corpus(root / "corpus", 40)
    build_shards(manifest, root / "shards", str(save_tiny_mimi(root / "codec")), workers=0)
    train_bpe([" ".join(WORDS)] * 100, root / "base", vocab_size=400)
    prepare_tokenizer(root / "base", root / "tokenizer")
    model = model_config(acoustic_delay=1).model_dump(mode="json") | {"codec": None}
    model["llm"]["vocab_size"] = 0
    settings = {
        "run": {"dir": str(root / "run"), "wandb": {"mode": "disabled"}},
        "model": model,
        "data": {"train": [str(root / "shards")], "tokenizer": str(root / "tokenizer"), "virtual_streams": 4, "num_workers": 1},
        "row": {"seq": 256, "codec": 128, "encoder": 640, "spoken": 128, "supervised": 128},
        "batch": {"global_rows": 4, "micro_rows": 1},
        "optim": {"lr": 5e-4, "warmup_steps": 2},
        "train": {"steps": STEPS, "log_every": 1, "save_every": SAVED, "keep_last": 3},
        "engine": {"deepspeed": "ds_configs/zero3_cpu.json", "dtype": "fp32"},
    }
    path = root / "recipe.yaml"
    path.write_text(json.dumps(settings))
    return path


def losses(run: Path) -> list[float]:
    return [report.loss for report in RunDirectory(run).reports()]


def test_killed_and_restarted(recipe: Path, tmp_path: Path) -> None:
    whole, killed, other = tmp_path / "whole", tmp_path / "killed", tmp_path / "other"
    launch(recipe, f"run.dir={whole}").check()
    train_and_kill(recipe, killed, KILLED)
    assert KILLED <= last_step(killed) < STEPS - 1
    shutil.copytree(killed, other)

    launch(recipe, f"run.dir={killed}").check()
    assert exact_losses(killed, range(STEPS)) == exact_losses(whole, range(STEPS))
    assert len(losses(killed)) == STEPS

    launch(recipe, f"run.dir={other}", "parallel.tensor=2", "batch.micro_rows=2").check()
    assert exact_losses(other, range(SAVED)) == exact_losses(whole, range(SAVED))
    assert losses(other)[SAVED : SAVED + 5] == pytest.approx(losses(whole)[SAVED : SAVED + 5], rel=1e-5)
    ends = [open_checkpoint(run).state for run in (whole, killed, other)]
    assert [end.step for end in ends] == [STEPS] * 3
    assert ends[0].data == ends[1].data == ends[2].data  # every stream has come as far: the same rows in the same order
    assert ends[0].samples == ends[1].samples == ends[2].samples
