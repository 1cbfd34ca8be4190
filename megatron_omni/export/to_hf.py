"""A checkpoint of any topology -> a verified Hugging Face directory, on the CPU, one file of weights in memory at a time.

The directory appears under its name when it is complete and has been checked: weights bit-equal to the checkpoint
(rounded to the asked dtype), and logits of the reloaded classes equal to the training model's on a random packed row.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, Protocol

import orjson
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from pydantic import JsonValue
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaForCausalLM, MimiModel

from megatron_omni.audio.codec import Mimi
from megatron_omni.audio.mimi_transformers import TransformersMimi
from megatron_omni.checkpoint.load import open_checkpoint
from megatron_omni.checkpoint.state import CheckpointState
from megatron_omni.config.model import CodecConfig, ModelConfig
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.export.card import model_card
from megatron_omni.export.configuration import OmniConfig
from megatron_omni.export.modeling import OmniForConditionalGeneration
from megatron_omni.export.processing import OmniProcessor
from megatron_omni.export.verify import Verified, open_weights, resolved_model, verify
from megatron_omni.export.weights import Rows, llama_weights, omni_weights
from megatron_omni.model.omni import OmniModel
from megatron_omni.parallel.topology import TensorParallel
from megatron_omni.runtime.cli import progress
from megatron_omni.runtime.errors import InputError, WorkError
from megatron_omni.runtime.files import atomic_write, fsync_tree

Dtype = Literal["float32", "bfloat16"]
MAX_SHARD = "5GB"
"""Largest file of weights, as the Hub recommends; also the memory that exporting takes."""


class Source(Protocol):
    """What is read of a checkpoint."""

    path: Path
    state: CheckpointState

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read_full(self, name: str) -> torch.Tensor: ...


def to_hf(checkpoint: Path, out: Path, codec: str, tokenizer: Path | None = None, dtype: Dtype = "float32") -> Verified:
    """Exports ``checkpoint``, a checkpoint or a run directory (then its newest good one), to the new directory ``out``.

    Args:
        codec: folder or Hub id of the codec that made the training targets.
        tokenizer: its folder; None: where the run's recipe says.
        dtype: of the stored weights; the codec stays float32.

    Raises:
        InputError: ``out`` exists; the codec or the tokenizer is not the one of the training; a model that transformers
            has no class for.
        WorkError: the checkpoint is damaged, has missing, extra, empty or non-finite tensors, or what was written does
            not equal it. Nothing stays under ``out``.
    """
    if out.exists():
        raise InputError(f"{out} exists: choose another name, or remove it first")
    source: Source = open_checkpoint(checkpoint)
    model = resolved_model(source.state, source.path)
    _check_names(source, model)
    mimi = _codec(codec, model.codec)
    text = _tokenizer(source.state, tokenizer, model)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(partial, out.name, source, model, mimi, text, dtype)
        verified = verify(source.path, partial)
        fsync_tree(partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return verified


def _write(folder: Path, name: str, source: Source, model: ModelConfig, mimi: MimiModel, text: OmniTokenizer, dtype: Dtype) -> None:
    config = OmniConfig.of(model, mimi.config, text.pad_id, text.eos_id)
    config.architectures, config.dtype = [OmniForConditionalGeneration.__name__], getattr(torch, dtype)
    llama = config.get_text_config()
    llama.architectures, llama.dtype = [LlamaForCausalLM.__name__], config.dtype
    never = {text.audio_id, text.pad_id, *range(text.vocab_size, text.padded_vocab_size)} - {text.eos_id}
    generation = GenerationConfig(eos_token_id=text.eos_id, pad_token_id=text.pad_id, suppress_tokens=sorted(never), do_sample=False)
    generation.max_new_tokens = 256

    @lru_cache(maxsize=1)  # the parts of a fused tensor follow each other
    def whole(name: str) -> torch.Tensor:
        tensor = source.read_full(name)
        if not tensor.numel() or not bool(tensor.isfinite().all()):
            fault = "is empty" if not tensor.numel() else f"holds {int((~tensor.isfinite()).sum())} values that are not finite"
            raise WorkError(f"{source.path}: tensor {name} {fault}; export an older checkpoint of the run")
        return tensor.to(getattr(torch, dtype))

    def shapes(weights: Mapping[str, Rows]) -> dict[str, torch.Tensor]:
        return {theirs: _meta(source.shape(rows.name), rows, getattr(torch, dtype)) for theirs, rows in weights.items()}

    codec = {f"codec.{key}": tensor for key, tensor in _codec_weights(mimi).items()}
    omni, plain = omni_weights(model.llm, source.names()), llama_weights(model.llm)
    config.save_pretrained(folder)
    generation.save_pretrained(folder)
    OmniProcessor.of(model, text).save_pretrained(str(folder))
    _write_weights(
        folder,
        shapes(omni) | {key: tensor.to("meta") for key, tensor in codec.items()},
        lambda key: codec[key] if key in codec else omni[key].of(whole(omni[key].name)),
    )
    llama.save_pretrained(folder / "llm")
    generation.save_pretrained(folder / "llm")
    text.save(folder / "llm")
    _write_weights(folder / "llm", shapes(plain), lambda key: plain[key].of(whole(plain[key].name)))
    parameters = sum(math.prod(source.shape(key)) for key in source.names())
    atomic_write(folder / "README.md", model_card(name, model, source.state, parameters, dtype))


def _meta(shape: tuple[int, ...], rows: Rows, dtype: torch.dtype) -> torch.Tensor:
    return rows.of(torch.empty(shape, dtype=dtype, device="meta"))


def _write_weights(folder: Path, shapes: Mapping[str, torch.Tensor], read: Callable[[str], torch.Tensor]) -> None:
    """Safetensors files as ``save_pretrained`` names them, one in memory at a time; ``shapes`` are meta tensors."""
    split = split_torch_state_dict_into_shards(dict(shapes), max_shard_size=MAX_SHARD)
    for filename, names in progress(split.filename_to_tensors.items(), f"writing {folder.name}"):
        save_file({name: read(name).contiguous() for name in names}, folder / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        atomic_write(folder / "model.safetensors.index.json", orjson.dumps(index, option=orjson.OPT_INDENT_2))


def _check_names(source: Source, model: ModelConfig) -> None:
    """The checkpoint holds the model's tensors, all of them, no others, in their shapes."""
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in OmniModel(model, TensorParallel.single()).named_parameters()}
    found = {name: source.shape(name) for name in source.names()}
    if missing := sorted(expected.keys() - found.keys()):
        raise WorkError(f"{source.path} lacks {len(missing)} tensors of its model, such as {missing[:3]}; export another checkpoint")
    if extra := sorted(found.keys() - expected.keys()):
        raise WorkError(f"{source.path} holds {len(extra)} tensors that its model does not have, such as {extra[:3]}")
    if wrong := [name for name in expected if found[name] != expected[name]]:
        raise WorkError(f"{source.path}: tensor {wrong[0]} has shape {found[wrong[0]]}, its model's has {expected[wrong[0]]}")


def _codec(folder_or_id: str, expected: CodecConfig | None) -> MimiModel:
    assert expected is not None
    network = TransformersMimi.load(folder_or_id)
    mimi = Mimi(network, expected.num_codebooks)
    if expected.weights_hash and mimi.weights_hash != expected.weights_hash:
        raise InputError(
            f"codec {folder_or_id}: its weights (sha256 {mimi.weights_hash[:12]}...) are not those that made the training "
            f"targets ({expected.weights_hash[:12]}...); give the codec that the shards were made with"
        )
    return network.model


def _codec_weights(mimi: MimiModel) -> dict[str, torch.Tensor]:
    """Under the names of Mimi's files, which stay; those of its modules change with the version of transformers."""
    with TemporaryDirectory() as folder:
        mimi.save_pretrained(folder)
        with open_weights(Path(folder)) as (names, read):
            return {name: read(name) for name in names}


def _tokenizer(state: CheckpointState, folder: Path | None, model: ModelConfig) -> OmniTokenizer:
    if folder is None:
        folder = _recorded_tokenizer(state.recipe)
    tokenizer = OmniTokenizer.load(folder)
    if tokenizer.fingerprint != state.fingerprints.get("tokenizer", tokenizer.fingerprint):
        raise InputError(
            f"tokenizer {folder}: fingerprint {tokenizer.fingerprint}, trained with {state.fingerprints['tokenizer']}; give that one"
        )
    if tokenizer.padded_vocab_size != model.llm.vocab_size:
        raise InputError(
            f"tokenizer {folder}: {tokenizer.padded_vocab_size} entries (padded), the model has {model.llm.vocab_size}; "
            "give the one that it was trained with"
        )
    return tokenizer


def _recorded_tokenizer(recipe: JsonValue) -> Path:
    data = recipe.get("data") if isinstance(recipe, dict) else None
    folder = data.get("tokenizer") if isinstance(data, dict) else None
    if not isinstance(folder, str) or not Path(folder).is_dir():
        raise InputError(f"the run's recipe names the tokenizer {folder!r}, which is not here; name its folder with --tokenizer")
    return Path(folder)
