"""Metrics: one row per step whatever was killed and resumed, and wandb never in the way."""

import dataclasses
import math

import orjson
import pytest
import wandb
import yaml

from megatron_omni.config.load import load_recipe
from megatron_omni.config.recipe import Recipe
from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.run_directory import RunDirectory
from megatron_omni.schema import StepReport
from megatron_omni.train.metrics import MetricsWriter, console_line, scalars

STACK = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 8}
BOTH_WAYS = STACK | {"causal": False}

REPORT = StepReport(
    step=0,
    loss=5.0,
    text_loss=1.0,
    text_accuracy=0.5,
    codec_loss=(4.0, 5.0),
    codec_accuracy=(0.1, 0.2),
    codec_entropy=(5.5, 5.6),
    grad_norm=1.0,
    lr=1e-3,
    tokens_per_second=1000.0,
    audio_seconds_per_second=12.0,
    fill={"seq": 0.97, "codec": 0.5},
    seconds=0.5,
    data_wait_seconds=0.01,
    data_stall=0.02,
    memory_bytes=2**30,
)


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    path = tmp_path / "recipe.yaml"
    data = {
        "run": {"dir": "runs/x", "wandb": {"mode": "disabled"}},
        "model": {
            "encoder": {"stack": BOTH_WAYS},
            "projector": {"hidden_size": 8},
            "llm": {"stack": STACK},
            "audio_head": {"pre_nn": BOTH_WAYS, "decoder": STACK, "depformer": STACK},
        },
        "data": {"train": ["shards"], "tokenizer": "tokenizer"},
        "row": {"seq": 128, "codec": 128, "encoder": 400, "spoken": 32, "supervised": 128},
        "batch": {"global_rows": 1},
        "optim": {"lr": 1e-3},
        "train": {"steps": 100},
        "engine": {"deepspeed": "ds.json"},
    }
    path.write_text(yaml.safe_dump(data))
    return load_recipe(path)


def write(run, recipe, steps, start_step=0, rank=0):
    with MetricsWriter(run, recipe, rank, start_step) as writer:
        for step in steps:
            writer.write(dataclasses.replace(REPORT, step=step))


def steps_of(run):
    return [report.step for report in RunDirectory(run).reports()]


def test_a_resumed_run_has_one_row_per_step(tmp_path, recipe):
    write(tmp_path, recipe, range(6))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # what a kill leaves
    write(tmp_path, recipe, range(4, 8), start_step=4)
    assert steps_of(tmp_path) == list(range(8))


def test_other_ranks_write_nothing(tmp_path, recipe):
    write(tmp_path / "run", recipe, range(3), rank=1)
    assert not (tmp_path / "run").exists()


def test_damage_inside_the_file_is_named(tmp_path, recipe):
    write(tmp_path, recipe, range(2))
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([lines[0], b"{", lines[1], b""]))
    with pytest.raises(InputError, match=r"metrics.jsonl:2"):
        steps_of(tmp_path)


def test_not_a_number_survives_json():
    report = dataclasses.replace(REPORT, grad_norm=math.nan, codec_loss=(math.nan, 1.0))
    again = StepReport.from_json(orjson.loads(orjson.dumps(report.to_json())))
    assert math.isnan(again.grad_norm)
    assert math.isnan(again.codec_loss[0])
    assert again.codec_loss[1] == 1.0


def test_console_line_and_scalars():
    line = console_line(REPORT, 100)
    assert "\n" not in line
    for piece in ("step 1/100", "loss 5.0000", "codec0 4.000 of 5.50", "fill 97.0%", "data 2%"):
        assert piece in line
    flat = scalars(REPORT)
    assert flat["codec_loss/1"] == 5.0
    assert flat["fill/codec"] == 0.5
    assert all(isinstance(value, int | float) for value in flat.values())


def with_wandb(recipe):
    options = recipe.run.wandb.model_copy(update={"mode": "offline"})
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"wandb": options})})


def test_wandb_offline_keeps_its_id_over_a_resume(tmp_path, recipe):
    write(tmp_path, with_wandb(recipe), range(2))
    first = (tmp_path / "wandb_id").read_text()
    write(tmp_path, with_wandb(recipe), range(2, 3), start_step=2)
    assert (tmp_path / "wandb_id").read_text() == first
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{first}"))) >= 1


def test_a_failing_wandb_does_not_end_the_run(tmp_path, recipe, monkeypatch):
    def broken(**_):
        raise ConnectionError("the service is away")

    monkeypatch.setattr(wandb, "init", broken)
    write(tmp_path, with_wandb(recipe), range(3))
    assert steps_of(tmp_path) == [0, 1, 2]


def test_run_directory_describes_itself(tmp_path):
    RunDirectory(tmp_path).describe("run: {}\n", world_size=2)
    assert (tmp_path / "config.yaml").read_text() == "run: {}\n"
    environment = orjson.loads((tmp_path / "environment.json").read_bytes())
    assert environment["world_size"] == 2
    assert "torch" in environment["packages"]
