"""Is an exported directory the checkpoint that it came from? Every weight, and the logits of what transformers reloads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from megatron_omni.audio.features import LogMel
from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.checkpoint.load import Checkpoint, open_checkpoint
from megatron_omni.checkpoint.state import CheckpointState
from megatron_omni.config.model import ModelConfig
from megatron_omni.data.render import demand
from megatron_omni.data.rows.collate import Packed, collate
from megatron_omni.export.modeling import OmniForConditionalGeneration
from megatron_omni.export.weights import Rows, llama_weights, logical_tensors, omni_weights
from megatron_omni.model.omni import OmniModel
from megatron_omni.parallel.topology import TensorParallel
from megatron_omni.runtime.errors import WorkError
from megatron_omni.runtime.seeds import generator, rng
from megatron_omni.schema import AudioSpan, Batch, Counts, LossScale, Rendered, RowShape, Sample, SampleArrays, SpeechSpan

TOLERANCE = 1e-5
"""Largest absolute difference of a logit, in float32."""


@dataclass(frozen=True)
class Verified:
    """A directory that equals its checkpoint."""

    checkpoint: str
    step: int
    tensors: int
    """Tensors in the Hugging Face format, the codec's included, ``llm/`` not."""
    bytes: int
    """Of their files."""
    max_abs_diff: float
    """Of text logits, of ``llm/``'s logits and of mean codec losses, against the training model."""


def resolved_model(state: CheckpointState, path: Path) -> ModelConfig:
    """The checkpoint's model, with its codec and vocabulary; ``WorkError`` if it does not say."""
    model = state.model
    if model is None or model.codec is None or not model.llm.vocab_size:
        raise WorkError(f"{path / 'state.json'}: no whole model configuration (codec, vocabulary); save the checkpoint again with it")
    return model


def verify(checkpoint: Path, folder: Path) -> Verified:
    """Compares the exported ``folder`` with ``checkpoint`` (a checkpoint, or a run: its newest good one).

    Raises:
        WorkError: a missing, extra or different tensor, another codec, or logits further apart than ``TOLERANCE``.
    """
    source = open_checkpoint(checkpoint)
    model = resolved_model(source.state, source.path)
    omni = omni_weights(model.llm, source.names())
    codec = _check_weights(source, folder, omni, ignore="codec.")
    _check_weights(source, folder / "llm", llama_weights(model.llm))
    return Verified(
        checkpoint=str(source.path),
        step=source.state.step,
        tensors=len(omni) + codec,
        bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        max_abs_diff=_compare_outputs(source, folder, model, omni),
    )


@contextmanager
def open_weights(folder: Path) -> Iterator[tuple[list[str], Callable[[str], torch.Tensor]]]:
    """Names, and a reader by name, of a folder's safetensors files, sharded or not; nothing is read before it is asked for."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files: Mapping[str, str] = orjson.loads(index.read_bytes())["weight_map"]
    else:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            files = dict.fromkeys(file.keys(), "model.safetensors")
    with ExitStack() as stack:
        handles = {name: stack.enter_context(safe_open(folder / name, framework="pt")) for name in set(files.values())}
        yield list(files), lambda name: handles[files[name]].get_tensor(name)


def _check_weights(source: Checkpoint, folder: Path, weights: Mapping[str, Rows], ignore: str = "\0") -> int:
    """Every tensor is there, bit-equal, and there are no others; returns how many began with ``ignore``."""
    with open_weights(folder) as (names, read):
        ignored = [name for name in names if name.startswith(ignore)]
        if different := set(weights).symmetric_difference(set(names) - set(ignored)):
            raise WorkError(f"{folder}: {len(different)} tensors are missing or unknown, such as {sorted(different)[:3]}; export it again")
        for name, tensor in logical_tensors(weights, read):
            stored = source.read_full(name).to(tensor.dtype)
            if stored.shape != tensor.shape or not torch.equal(stored, tensor):
                raise WorkError(f"{folder}: {name} differs from {source.path}; export it again")
        return len(ignored)


@torch.no_grad()
def _compare_outputs(source: Checkpoint, folder: Path, model: ModelConfig, weights: Mapping[str, Rows]) -> float:
    """Largest difference between the training model and what transformers reloads, on a random packed batch."""
    exported = OmniForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.codec is not None
    mimi = exported.mimi()
    if model.codec.weights_hash and mimi.weights_hash != model.codec.weights_hash:
        raise WorkError(f"{folder}: the codec's weights are not those of the training targets; export it again with the right codec")
    ours = OmniModel(model, TensorParallel.single()).eval()
    parameters = dict(ours.named_parameters())
    with open_weights(folder) as (_, read):  # bit-equal to the checkpoint, in the export's precision
        for name, tensor in logical_tensors(weights, read):
            parameters[name].copy_(tensor)

    batch = random_batch(model)
    hidden_BTD = ours.hidden_states(batch)
    logits_BTV = hidden_BTD @ ours.llm.head.weight.T
    reloaded_BTV = exported.llm.lm_head(exported.packed_hidden_states(batch))
    plain = AutoModelForCausalLM.from_pretrained(folder / "llm", dtype=torch.float32).eval()
    exported.llm = plain
    plain_BTV = plain.lm_head(exported.packed_hidden_states(batch))

    counts = torch.tensor(Counts.of(batch).codec).clamp(min=1)
    nothing = LossScale(0.0, (0.0,) * model.codec.num_codebooks)
    codec = (ours(batch, nothing).codec_sum_K - exported.packed_losses(batch).codec_sum_K) / counts
    differences = {"logits": logits_BTV - reloaded_BTV, "logits of llm/": logits_BTV - plain_BTV, "codec losses": codec}
    largest = {name: float(difference.abs().max()) for name, difference in differences.items()}
    for name, value in largest.items():
        if not value <= TOLERANCE:
            raise WorkError(f"{folder}: {name} differ by {value:.2e} from the training model's, more than {TOLERANCE}")
    return max(largest.values())


def random_batch(model: ModelConfig, samples: int = 3, seed: int = 0) -> Batch:
    """One packed row of conversations without meaning: audio, text, codes."""
    assert model.codec is not None
    codec, geometry, random = model.codec, EncoderGeometry.of(model), rng("verify", seed)
    packed: list[Packed] = []
    for number in range(samples):
        wave = torch.randn(int(random.integers(4000, 12000)), generator=generator("verify", seed, number)).numpy() * 0.1
        heard = geometry.num_audio_embeddings(len(wave))
        said, frames = int(random.integers(3, 9)), int(random.integers(4, 12))
        tokens = random.integers(0, model.llm.vocab_size, heard + said + 2).astype(np.int32)
        mask = np.arange(len(tokens)) > heard
        codes_KT = random.integers(0, codec.card, (codec.num_codebooks, frames)).astype(np.uint16)
        start = len(tokens) - said
        sample = Sample(f"random-{number}", "converse", "", (), {"audio0": len(wave)}, {"codes0": frames})
        rendered = Rendered(tokens, mask, (AudioSpan("audio0", 1, heard),), (SpeechSpan("codes0", start, len(tokens)),))
        packed.append((sample, rendered, SampleArrays({"audio0": wave}, {"codes0": codes_KT})))
    delay = model.audio_head.acoustic_delay
    need = [demand(sample, rendered, geometry, delay) for sample, rendered, _ in packed]
    shape = RowShape(
        seq=sum(one.seq for one in need) + 5,  # some padding too
        codec=sum(one.codec for one in need) + 5,
        encoder=sum(one.encoder for one in need) + geometry.stack,
        spoken=sum(one.spoken for one in need) + 5,
        supervised=-(-sum(one.supervised for one in need) // 128) * 128,
    )
    return collate([packed], shape, geometry, LogMel(model.features), codec, delay, pad_id=0)
