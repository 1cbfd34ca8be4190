"""Reads recipes and DeepSpeed JSON files; what is wrong with one is said by key, with the value and the way out."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from megatron_omni.config.recipe import Recipe
from megatron_omni.runtime.errors import InputError

# --------------------------------------------------------------------------- recipes


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the YAML file ``path``, with ``key.sub=value`` overrides (values are YAML) applied over it.

    Raises ``InputError`` for all faults at once: an unknown key names the nearest right one, a wrong value its key,
    what was given and what is allowed.
    """
    data = _read_yaml(path)
    given: set[str] = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise InputError(f"override {override!r} is not key=value; expected something like optim.lr=3e-4")
        _put(data, key, _parse_yaml(text, f"override {override!r}"))
        given.add(key)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(fault, path, given) for fault in error.errors())
        raise InputError("\n".join(lines)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML; ``load_recipe`` reads it back equal."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets a repeated key win in silence; here it is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, name: str) -> Any:
    try:
        return yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise InputError(f"{name} is not valid YAML: {error}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} cannot be read: {error}; recipes are YAML files such as those in launch/recipes") from error
    data = _parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise InputError(
            f"recipe {path} holds {type(data).__name__}, expected a mapping with the sections {', '.join(Recipe.model_fields)}"
        )
    return data


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    """Sets the dotted ``key``, making the sections on its way."""
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(data.get(section), dict):
            data[section] = {}
        data = data[section]
    data[last] = value


def _submodel(annotation: Any) -> type[BaseModel] | None:
    """The model class of a field's annotation, if it has one (``Model`` or ``Model | None``)."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key below ``model``."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if (below := _submodel(field.annotation)) is not None:
            yield from _keys(below, f"{prefix}{name}.")


def _nearest(key: str, known: Sequence[str]) -> str:
    """The known dotted key that ``key`` was probably meant to be: a sibling if one is close, else any."""
    section, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    if close := difflib.get_close_matches(name, siblings, 1):
        return f"did you mean {siblings[close[0]]}?"
    elsewhere = {k.rpartition(".")[2]: k for k in known}
    if close := difflib.get_close_matches(name, elsewhere, 1):
        return f"did you mean {elsewhere[close[0]]}?"
    return f"{section or 'the recipe'} has {', '.join(siblings)}"


def _field_path(location: Sequence[str | int]) -> str:
    """The dotted key of a fault; what pydantic adds below a field (union branch, list index) is left out."""
    model: type[BaseModel] | None = Recipe
    names: list[str] = []
    for name in location:
        names.append(str(name))
        if model is None or name not in model.model_fields:
            break
        model = _submodel(model.model_fields[str(name)].annotation)
        if model is None:
            break
    return ".".join(names)


def _explain(fault: Any, path: Path, given: set[str]) -> str:
    key = _field_path(fault["loc"])
    where = "override" if key in given else str(path)
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key {key}; {_nearest(key, list(_keys(Recipe)))}"
    if fault["type"] == "missing":
        return f"{where}: {key} is missing"
    if fault["type"] == "value_error":  # one of our own checks: its message is whole
        message = str(fault["ctx"]["error"])
        return f"{where}: {key}: {message}" if key else f"{where}: {message}"
    expected = fault["msg"].replace("Input should be", "expected", 1)
    return f"{where}: {key}={fault['input']!r}: {expected[0].lower()}{expected[1:]}"


# --------------------------------------------------------------------------- DeepSpeed JSON

DEEPSPEED_KEYS = frozenset(
    {
        "activation_checkpointing",
        "aio",
        "bf16",
        "comms_logger",
        "communication_data_type",
        "compile",
        "csv_monitor",
        "data_types",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "gradient_accumulation_steps",
        "gradient_allreduce_op",
        "gradient_clipping",
        "gradient_predivide_factor",
        "log_level",
        "memory_breakdown",
        "optimizer",
        "prescale_gradients",
        "seq_parallel_communication_data_type",
        "steps_per_print",
        "tensorboard",
        "timers",
        "torch_autocast",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)
"""Top-level keys that this trainer uses or passes on; DeepSpeed itself ignores unknown ones in silence."""

DEEPSPEED_REFUSED = {
    "fp16": "this trainer runs fp32 or bf16: set engine.dtype in the recipe",
    "scheduler": "the schedule is the recipe's: set optim.warmup_steps, optim.hold_fraction and optim.final_fraction",
    "tensor_parallel": "layers are cut by this package, not by AutoTP: set parallel.tensor in the recipe",
    "wandb": "set run.wandb in the recipe",
}


def deepspeed_config(recipe: Recipe, dp_size: int) -> dict[str, Any]:
    """The DeepSpeed JSON that the recipe names, with every ``"auto"`` filled from the recipe and ``dp_size``.

    Raises ``InputError`` for unknown keys, for a number that contradicts the recipe, and for settings that DeepSpeed
    accepts but trains wrongly with under our layers.
    """
    path = recipe.engine.deepspeed
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"engine.deepspeed={path} cannot be read as JSON: {error}; see ds_configs/") from error
    if not isinstance(config, dict):
        raise InputError(f"engine.deepspeed={path} holds a {type(config).__name__}, expected an object")
    for key in config:
        if key in DEEPSPEED_REFUSED:
            raise InputError(f"{path}: {key} is not used here; {DEEPSPEED_REFUSED[key]}")
        if key not in DEEPSPEED_KEYS:
            close = difflib.get_close_matches(key, DEEPSPEED_KEYS, 1)
            raise InputError(
                f"{path}: unknown key {key}; {f'did you mean {close[0]}?' if close else 'known: ' + ', '.join(sorted(DEEPSPEED_KEYS))}"
            )
    filled: dict[str, Any] = _fill(config, "", _automatic(recipe, dp_size), path)
    _refuse_traps(filled, recipe.parallel.tensor, path)
    filled.pop("optimizer", None)  # it says what the recipe says; the engine builds it from the recipe
    return filled


def _automatic(recipe: Recipe, dp_size: int) -> dict[str, Any]:
    """Values by dotted key for ``"auto"``; the ones of ZeRO-3 are those that Hugging Face's integration takes."""
    optim, width = recipe.optim, recipe.model.llm.stack.hidden_size
    return {
        "train_batch_size": recipe.batch.global_rows,
        "train_micro_batch_size_per_gpu": recipe.batch.micro_rows,
        "gradient_accumulation_steps": recipe.accumulation(dp_size),
        "gradient_clipping": optim.clip,
        "bf16.enabled": recipe.engine.dtype == "bf16",
        "optimizer.params.lr": optim.lr,
        "optimizer.params.betas": list(optim.betas),
        "optimizer.params.eps": optim.eps,
        "optimizer.params.weight_decay": optim.weight_decay,
        "zero_optimization.reduce_bucket_size": max(width * width, 1_000_000),
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * width * width),
        "zero_optimization.stage3_param_persistence_threshold": 10 * width,
    }


TUNABLE = ("zero_optimization.",)
"""Automatic values that a JSON may set to a number of its own; any other number must equal the recipe's."""


def _fill(value: Any, key: str, automatic: dict[str, Any], path: Path) -> Any:
    if isinstance(value, dict):
        return {name: _fill(below, f"{key}.{name}" if key else name, automatic, path) for name, below in value.items()}
    if value == "auto":
        if key not in automatic:
            raise InputError(f'{path}: {key} cannot be "auto"; "auto" is known for {", ".join(automatic)}')
        return automatic[key]
    if key in automatic and not key.startswith(TUNABLE) and value != automatic[key]:
        raise InputError(f'{path}: {key}={value!r} contradicts the recipe, which gives {automatic[key]!r}; write "auto"')
    return value


def _refuse_traps(config: dict[str, Any], tensor: int, path: Path) -> None:
    """Settings that run and train wrongly, or that our checkpoints cannot follow."""
    zero = config.get("zero_optimization", {})
    if tensor > 1:
        if zero.get("zero_hpz_partition_size", 1) > 1:
            raise InputError(
                f"{path}: zero_optimization.zero_hpz_partition_size={zero['zero_hpz_partition_size']} with parallel.tensor={tensor} "
                "gathers weights from tensor-parallel peers, which hold other slices; set it to 1, or parallel.tensor to 1"
            )
        for key in ("zero_quantized_gradients", "zero_quantized_weights"):
            if zero.get(key):
                raise InputError(
                    f"{path}: zero_optimization.{key} with parallel.tensor={tensor} communicates over the ranks of a node, "
                    "tensor-parallel peers included; remove it, or set parallel.tensor to 1"
                )
    if zero.get("round_robin_gradients"):
        raise InputError(f"{path}: zero_optimization.round_robin_gradients moves parameters between ranks; checkpoints need it to be false")
    optimizer = config.get("optimizer")
    if optimizer is not None and str(optimizer.get("type")).lower() != "adamw":
        raise InputError(f"{path}: optimizer.type={optimizer.get('type')!r} is not used here; expected 'AdamW', or no optimizer section")
