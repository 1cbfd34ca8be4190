"""The Mimi codec (Défossez et al., arXiv:2410.00037): waveforms to codebook indices and back.

Two implementations of the network stand behind one class: ``transformers`` and Kyutai's ``moshi``; from the same weights
they give the same codes. Batched codes equal one-by-one codes:

- Mimi is causal, so what follows a clip changes nothing before it. Clips of similar length are padded with silence to the
  longest of their batch, each first to whole frames, and the frames of the padding are cut off.
- Convolutions in TF32 would blur latents by batch, so float32 is float32.
- The nearest entry is searched in float64 (``codebooks``), so that the shape of a batch never decides.
- A CPU sums in another order with another number of threads; a codec keeps the number it was made under.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from transformers import MimiModel

from megatron_omni.audio.codebooks import CodeDifferences, SplitCodebooks
from megatron_omni.audio.mimi_moshi import MoshiMimi
from megatron_omni.audio.mimi_transformers import TransformersMimi
from megatron_omni.config.model import CodecConfig
from megatron_omni.runtime.errors import InputError

Backend = Literal["transformers", "moshi"]
Precision = Literal["float32", "bfloat16", "float16"]

BATCH_SECONDS = {"cpu": 4.0, "accelerator": 60.0}
"""Audio encoded at once by kind of device, padding counted. The real Mimi's activations take about 90 MB a second in float32;
on a CPU they have outgrown its caches at 8 s, and 60 s at once take a third longer than clip after clip."""

PADDING = 0.1
"""Largest share of a batch that may be padding."""


class MimiNetwork(Protocol):
    """An implementation of Mimi's layers."""

    num_semantic: int
    """Codebooks of the semantic part."""
    num_codebooks: int
    """Of the weights."""
    card: int
    sample_rate: int
    frame_rate: float

    @property
    def codebooks(self) -> SplitCodebooks:
        """On the device of the weights."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype) -> None: ...

    def latents(self, waves_B1W: torch.Tensor) -> torch.Tensor:
        """[B, T, D] in front of the quantizer; W is a whole number of frames."""
        ...

    def decode(self, codes_1KT: torch.Tensor) -> torch.Tensor:
        """[1, 1, W]."""
        ...

    def state(self) -> Mapping[str, torch.Tensor]:
        """All weights in the layout of ``transformers``; names may vary."""
        ...


def load_codec(
    folder_or_id: str | Path,
    backend: Backend = "transformers",
    num_codebooks: int | None = None,
    device: torch.device | str = "cpu",
    dtype: Precision = "float32",
) -> Mimi:
    """Loads a codec from a folder or the Hugging Face Hub.

    Args:
        folder_or_id: A Hugging Face folder or id; for ``moshi`` also one of Kyutai's ``.safetensors`` files.
        num_codebooks: The first K of those that the weights have; None: all.
        dtype: Of the encoder's arithmetic. Anything but float32 changes codes: see ``Mimi.compare``.

    Raises:
        InputError: There is no Mimi model under that name, it lacks weights, or ``moshi`` is not installed.
    """
    network = TransformersMimi.load(folder_or_id) if backend == "transformers" else MoshiMimi.load(folder_or_id)
    return Mimi(network, num_codebooks, device, dtype)


class Mimi:
    """A Mimi model in evaluation mode on one device."""

    def __init__(
        self,
        model: MimiModel | MimiNetwork,
        num_codebooks: int | None = None,
        device: torch.device | str = "cpu",
        dtype: Precision = "float32",
    ) -> None:
        self.network: MimiNetwork = TransformersMimi(model) if isinstance(model, MimiModel) else model
        smallest, available = self.network.num_semantic, self.network.num_codebooks
        self.num_codebooks: int = available if num_codebooks is None else num_codebooks
        """Codebooks used (K), semantic first; the first K of those that the weights have."""
        if not smallest <= self.num_codebooks <= available:
            raise InputError(f"num_codebooks={self.num_codebooks}: the codec's weights hold {available}; choose {smallest}..{available}")
        self.card: int = self.network.card
        """Entries of a codebook."""
        self.sample_rate: int = self.network.sample_rate
        """Hz."""
        self.frame_rate: float = self.network.frame_rate
        """Frames a second."""
        self.samples_per_frame: int = round(self.sample_rate / self.frame_rate)
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.threads: int = torch.get_num_threads()
        """Of its arithmetic on a CPU, whichever thread calls: torch's number where the codec was made."""
        self.network.to(self.device, torch.float32)
        if self.dtype != torch.float32:
            _ = self.weights_hash, self.network.codebooks  # while the weights are what was loaded
            self.network.to(self.device, self.dtype)

    @classmethod
    def from_pretrained(cls, folder_or_id: str | Path, num_codebooks: int | None = None, device: torch.device | str = "cpu") -> Mimi:
        """``load_codec`` with ``transformers`` in float32."""
        return load_codec(folder_or_id, "transformers", num_codebooks, device)

    @cached_property
    def weights_hash(self) -> str:
        """sha256, hex; computed when it is first asked for (the real Mimi takes about a second)."""
        return _weights_hash(self.network.state())

    def config(self) -> CodecConfig:
        """The provenance that a data set records and a model needs."""
        return CodecConfig(
            num_codebooks=self.num_codebooks,
            card=self.card,
            frame_rate=self.frame_rate,
            sample_rate=self.sample_rate,
            weights_hash=self.weights_hash,
        )

    def num_frames(self, num_samples: int) -> int:
        """Frames of a clip of ``num_samples`` samples at the codec's rate; a last partial frame counts."""
        return -(-num_samples // self.samples_per_frame)

    def encode(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Encodes float32 [W] clips at ``sample_rate``; returns uint16 [K, num_frames(W)] for each, in order.

        Raises:
            InputError: A clip is empty or not mono.
        """
        return [self.search(latents_TD) for latents_TD in self.latents(waves)]

    @torch.inference_mode()
    def latents(self, waves: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """What the quantizer hears: [num_frames(W), D] on the codec's device for each clip; raises as ``encode`` does."""
        for index, wave in enumerate(waves):
            if wave.ndim != 1 or wave.size == 0:
                raise InputError(f"codec: clip {index} has shape {list(wave.shape)}, expected a mono waveform [W] with W > 0")
        frames = [self.num_frames(wave.size) for wave in waves]
        latents: list[torch.Tensor] = [torch.empty(0)] * len(waves)
        capacity = math.floor(BATCH_SECONDS["cpu" if self.device.type == "cpu" else "accelerator"] * self.frame_rate)
        for chosen in _batches(frames, max(1, capacity)):
            batch_BW = np.zeros((len(chosen), max(frames[index] for index in chosen) * self.samples_per_frame), np.float32)
            for row, index in zip(batch_BW, chosen, strict=True):
                row[: waves[index].size] = waves[index]
            with _full_precision(), _num_threads(self.threads):
                latents_BTD = self.network.latents(torch.from_numpy(batch_BW)[:, None].to(self.device, self.dtype))
            for index, latents_TD in zip(chosen, latents_BTD, strict=True):
                latents[index] = latents_TD[: frames[index]]
        return latents

    @torch.inference_mode()
    def search(self, latents_TD: torch.Tensor) -> np.ndarray:
        """uint16 [K, T]: the codes of latents."""
        with _num_threads(self.threads):
            codes_KT = self.network.codebooks.search(latents_TD, self.num_codebooks)
        return np.ascontiguousarray(codes_KT.cpu().numpy(), dtype=np.uint16)

    @torch.inference_mode()
    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Decodes integer [K, T] codes to float32 [T * samples_per_frame] at ``sample_rate``; K may be fewer than ``num_codebooks``.

        Raises:
            InputError: The shape is wrong, or a code is no entry of a codebook.
        """
        if codes.ndim != 2 or not 1 <= codes.shape[0] <= self.num_codebooks or codes.shape[1] == 0:
            raise InputError(f"codec: codes have shape {list(codes.shape)}, expected [K, T] with K in 1..{self.num_codebooks} and T > 0")
        codes_KT = codes.astype(np.int64)
        if codes_KT.min() < 0 or codes_KT.max() >= self.card:
            raise InputError(f"codec: codes span {codes_KT.min()}..{codes_KT.max()}, expected 0..{self.card - 1}")
        with _full_precision(), _num_threads(self.threads):
            audio = self.network.decode(torch.from_numpy(codes_KT)[None].to(self.device))
        wave: np.ndarray = audio[0, 0, : codes.shape[1] * self.samples_per_frame].float().cpu().numpy()
        return wave

    def compare(self, waves: Sequence[np.ndarray], codes: Sequence[np.ndarray]) -> CodeDifferences:
        """How ``codes`` that another encoding gave of the same clips differ from this codec's own, and how many are ties.

        A codec of the same weights in float32 is the reference for one in lower precision.
        """
        latents = self.latents(waves)
        own = np.concatenate([self.search(latents_TD) for latents_TD in latents], axis=1)
        return self.network.codebooks.differences(torch.cat(latents), own, np.concatenate(list(codes), axis=1))


def _batches(frames: Sequence[int], capacity: int) -> Iterator[list[int]]:
    """Clips by length, longest first, in batches of at most ``capacity`` frames, of which at most ``PADDING`` are padding."""
    batch: list[int] = []
    held = 0
    for index in sorted(range(len(frames)), key=lambda index: -frames[index]):
        padded = (len(batch) + 1) * frames[batch[0]] if batch else 0
        if batch and (padded > capacity or padded - held - frames[index] > PADDING * padded):
            yield batch
            batch, held = [], 0
        batch.append(index)
        held += frames[index]
    if batch:
        yield batch


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 convolutions without TF32, by a fixed algorithm: a code is an argmin, and near ties must fall the same way."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@contextmanager
def _num_threads(count: int) -> Iterator[None]:
    """``torch.set_num_threads`` holds for the calling thread; a convolution in a fresh one may take all cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _weights_hash(state: Mapping[str, torch.Tensor]) -> str:
    """sha256 of the sorted hashes of all tensors, whose names (they change between versions of transformers) are left out."""
    hashes = sorted(
        hashlib.sha256(f"{list(tensor.shape)}".encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes()).digest()
        for tensor in state.values()
    )
    return hashlib.sha256(b"".join(hashes)).hexdigest()
