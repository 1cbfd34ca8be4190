"""Recipes: what is read, what is refused, and what the refusal says."""

import json
from pathlib import Path

import pytest
import yaml

from megatron_omni.config.load import deepspeed_config, dump_recipe, load_recipe
from megatron_omni.runtime.errors import InputError

STACK = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128}
BIDIRECTIONAL = STACK | {"causal": False}
DS_CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))

RECIPE = {
    "run": {"dir": "runs/test"},
    "model": {
        "encoder": {"stack": BIDIRECTIONAL},
        "projector": {"hidden_size": 64},
        "llm": {"stack": STACK | {"num_kv_heads": 2}},
        "audio_head": {"pre_nn": BIDIRECTIONAL, "decoder": STACK, "depformer": STACK},
    },
    "data": {"train": ["shards"], "tokenizer": "tokenizer"},
    "row": {"seq": 128, "codec": 128, "encoder": 400, "spoken": 32, "supervised": 128},
    "batch": {"global_rows": 8, "micro_rows": 2},
    "optim": {"lr": 1e-3},
    "train": {"steps": 100},
    "engine": {"deepspeed": str(DS_CONFIGS[0].parent / "zero3_cpu.json"), "dtype": "fp32"},
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def test_recipe_reads_back_equal(path, tmp_path):
    recipe = load_recipe(path)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_overrides_are_yaml_values(path):
    overrides = ["optim.lr=3e-4", "data.train=[a, b]", "run.wandb.mode=disabled", "train.frozen=['encoder.*']", "loss.codec_weights=2"]
    recipe = load_recipe(path, overrides)
    assert recipe.optim.lr == 3e-4
    assert recipe.data.train == (Path("a"), Path("b"))
    assert recipe.run.wandb.mode == "disabled"
    assert recipe.train.frozen == ("encoder.*",)
    assert recipe.loss.weights(3) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rat=1", "unknown key optim.learning_rat; optim has lr, betas"),
        ("optim.warmup_step=1", "did you mean optim.warmup_steps?"),
        ("batch.tensor=2", "did you mean parallel.tensor?"),
        ("optimizer.lr=1", "did you mean optim?"),
        ("model.llm.stack.hiden_size=2", "did you mean model.llm.stack.hidden_size?"),
        ("run.wandb.mode=off", r"run.wandb.mode=False: expected 'offline', 'online' or 'disabled'"),
        ("optim.lr=fast", "optim.lr='fast': expected a valid number"),
        ("optim.lr=-1", "optim.lr=-1: expected greater than 0"),
        ("loss.codec_weights=[1, heavy]", "override: loss.codec_weights="),
        ("row.supervised=100", "row.supervised=100: expected a multiple of 128"),
        ("train.steps=null", "train.steps=None: expected a valid integer"),
        ("parallel.tensor=3", "parallel.tensor=3 does not divide model.llm.stack.num_heads=4; choose 1 or 2"),
        ("parallel.tensor=4", "parallel.tensor=4 does not divide model.llm.stack.num_kv_heads=2; choose 1 or 2"),
        ("batch.micro_rows=3", "batch.micro_rows=3 does not divide batch.global_rows=8; choose 1, 2, 4 or 8"),
        ("model.encoder.stack.causal=true", "model: encoder.stack and audio_head.pre_nn are bidirectional"),
        ("optim.lr", "is not key=value"),
        ("optim.lr=[", "is not valid YAML"),
    ],
)
def test_refusals_name_key_value_and_way_out(path, override, message):
    with pytest.raises(InputError) as refusal:
        load_recipe(path, [override])
    assert message in str(refusal.value)


def test_all_faults_are_said_at_once(path):
    with pytest.raises(InputError) as refusal:
        load_recipe(path, ["optim.lr=fast", "train.step=3"])
    assert "optim.lr" in str(refusal.value)
    assert "train.steps?" in str(refusal.value)


def test_missing_and_repeated_keys(path):
    path.write_text(yaml.safe_dump({k: v for k, v in RECIPE.items() if k != "optim"}))
    with pytest.raises(InputError, match="optim is missing"):
        load_recipe(path)
    path.write_text("run: {dir: a}\nrun: {dir: b}\n")
    with pytest.raises(InputError, match="'run' is given twice"):
        load_recipe(path)
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(path.with_name("absent.yaml"))


def test_world_must_fit(path):
    recipe = load_recipe(path, ["parallel.tensor=2"])
    assert recipe.data_parallel(4) == 2
    assert recipe.accumulation(2) == 2
    with pytest.raises(InputError, match=r"parallel.tensor=2 does not divide the 3 ranks"):
        recipe.data_parallel(3)
    with pytest.raises(InputError, match=r"choose batch.global_rows as a multiple of 16"):
        recipe.data_parallel(16)
    with pytest.raises(InputError, match=r"data.virtual_streams=64 cannot be shared by 3"):
        recipe.data_parallel(6)
    with pytest.raises(InputError, match="has 2 entries"):
        load_recipe(path, ["loss.codec_weights=[1, 2]"]).loss.weights(8)


@pytest.mark.parametrize("json_path", DS_CONFIGS, ids=lambda p: p.stem)
def test_every_deepspeed_config_is_filled_and_agrees(path, json_path):
    recipe = load_recipe(path, [f"engine.deepspeed={json_path}", "optim.clip=0.5"])
    config = deepspeed_config(recipe, dp_size=2)
    assert "optimizer" not in config
    assert "auto" not in json.dumps(config)
    assert config["train_batch_size"] == 8
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 2 == 8
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": False}


@pytest.mark.parametrize(
    ("extra", "overrides", "message"),
    [
        ({"zero_optimisation": {}}, [], "unknown key zero_optimisation; did you mean zero_optimization?"),
        ({"gradient_clipping": 7.0}, [], "gradient_clipping=7.0 contradicts the recipe, which gives 1.0"),
        ({"scheduler": {}}, [], "set optim.warmup_steps"),
        ({"tensor_parallel": {"autotp_size": 2}}, [], "set parallel.tensor"),
        ({"steps_per_print": "auto"}, [], 'steps_per_print cannot be "auto"'),
        ({"zero_optimization": {"zero_hpz_partition_size": 2}}, ["parallel.tensor=2"], "zero_hpz_partition_size=2 with parallel.tensor=2"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, ["parallel.tensor=2"], "zero_quantized_gradients"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, ["parallel.tensor=2"], "zero_quantized_weights"),
        ({"zero_optimization": {"round_robin_gradients": True}}, [], "round_robin_gradients"),
        ({"zero_optimization": {"stage": 3}, "optimizer": {"type": "Muon"}}, [], "optimizer.type='Muon'"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 5.0}}}, [], "optimizer.params.lr=5.0 contradicts the recipe"),
    ],
)
def test_deepspeed_traps_are_refused(path, tmp_path, extra, overrides, message):
    (tmp_path / "ds.json").write_text(json.dumps(extra))
    recipe = load_recipe(path, [f"engine.deepspeed={tmp_path / 'ds.json'}", *overrides])
    with pytest.raises(InputError) as refusal:
        deepspeed_config(recipe, 1)
    assert message in str(refusal.value)


def test_hpz_is_allowed_without_tensor_parallel(path, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}))
    recipe = load_recipe(path, [f"engine.deepspeed={tmp_path / 'ds.json'}"])
    assert deepspeed_config(recipe, 2)["zero_optimization"]["zero_hpz_partition_size"] == 2
