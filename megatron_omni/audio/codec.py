"""The Mimi codec (Défossez et al., arXiv:2410.00037): waveforms to codebook indices and back, through ``transformers``.

Clips are batched only with clips of the same number of frames, each padded with silence to whole frames. Nothing
inside the model then depends on a neighbour or on padding, and batched codes equal one-by-one codes; convolutions in
TF32 would blur that, so they run in full float32.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from transformers import AutoConfig, MimiModel

from megatron_omni.config.model import CodecConfig
from megatron_omni.runtime.errors import InputError

BATCH_SECONDS = 60.0
"""Audio encoded at once. The real Mimi's activations take about 25 MB a second."""


class Mimi:
    """A Mimi model in evaluation mode on one device; ``from_pretrained`` is the way in."""

    def __init__(self, model: MimiModel, num_codebooks: int | None = None, device: torch.device | str = "cpu") -> None:
        config = model.config
        smallest, available = config.num_semantic_quantizers, config.num_quantizers
        self.num_codebooks: int = available if num_codebooks is None else num_codebooks
        """Codebooks used (K), semantic first; the first K of those that the weights have."""
        if not smallest <= self.num_codebooks <= available:
            raise InputError(f"num_codebooks={self.num_codebooks}: the codec's weights hold {available}; choose {smallest}..{available}")
        self.card: int = config.codebook_size
        """Entries of a codebook."""
        self.sample_rate: int = config.sampling_rate
        """Hz."""
        self.frame_rate = float(config.frame_rate)
        """Frames a second."""
        self.samples_per_frame: int = round(self.sample_rate / self.frame_rate)
        self.device = torch.device(device)
        module: torch.nn.Module = model
        module.to(self.device).eval().requires_grad_(False)
        self.model = model

    @cached_property
    def weights_hash(self) -> str:
        """sha256, hex; computed when it is first asked for (the real Mimi takes about a second)."""
        return _weights_hash(self.model)

    @classmethod
    def from_pretrained(cls, folder_or_id: str | Path, num_codebooks: int | None = None, device: torch.device | str = "cpu") -> Mimi:
        """Loads safetensors weights from a folder or the Hugging Face Hub.

        Raises:
            InputError: There is no Mimi model under that name, or it lacks weights.
        """
        try:
            kind = AutoConfig.from_pretrained(folder_or_id).model_type
            if kind != "mimi":
                raise InputError(f"codec {folder_or_id}: its config.json is of a {kind!r} model, expected 'mimi'")
            model, info = cast(
                tuple[MimiModel, dict[str, list[str]]],
                MimiModel.from_pretrained(folder_or_id, use_safetensors=True, dtype=torch.float32, output_loading_info=True),
            )
        except (OSError, ValueError) as error:
            raise InputError(f"codec {folder_or_id}: cannot be loaded ({error}); give a folder or Hub id such as kyutai/mimi") from error
        if info["missing_keys"]:
            raise InputError(f"codec {folder_or_id}: its file lacks the weights {sorted(info['missing_keys'])[:3]}; download it again")
        return cls(model, num_codebooks, device)

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

    @torch.inference_mode()
    def encode(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Encodes float32 [W] clips at ``sample_rate``; returns uint16 [K, num_frames(W)] for each, in order.

        Raises:
            InputError: A clip is empty or not mono.
        """
        by_frames: dict[int, list[int]] = defaultdict(list)
        for index, wave in enumerate(waves):
            if wave.ndim != 1 or wave.size == 0:
                raise InputError(f"codec: clip {index} has shape {list(wave.shape)}, expected a mono waveform [W] with W > 0")
            by_frames[self.num_frames(wave.size)].append(index)

        codes: list[np.ndarray] = [np.empty(0, np.uint16)] * len(waves)
        for frames, indices in by_frames.items():
            per_batch = max(1, math.floor(BATCH_SECONDS * self.frame_rate / frames))
            for first in range(0, len(indices), per_batch):
                chosen = indices[first : first + per_batch]
                batch_BW = np.zeros((len(chosen), frames * self.samples_per_frame), np.float32)
                for row, index in zip(batch_BW, chosen, strict=True):
                    row[: waves[index].size] = waves[index]
                with _full_precision():
                    encoded = self.model.encode(torch.from_numpy(batch_BW)[:, None].to(self.device), num_quantizers=self.num_codebooks)
                for index, codes_KT in zip(chosen, encoded.audio_codes.cpu().numpy(), strict=True):
                    codes[index] = np.ascontiguousarray(codes_KT, dtype=np.uint16)
        return codes

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
        with _full_precision():
            audio = self.model.decode(torch.from_numpy(codes_KT)[None].to(self.device)).audio_values
        wave: np.ndarray = audio[0, 0, : codes.shape[1] * self.samples_per_frame].float().cpu().numpy()
        return wave


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 convolutions without TF32, by a fixed algorithm: a code is an argmin, and near ties must fall the same way."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def _weights_hash(model: torch.nn.Module) -> str:
    """sha256 of the sorted hashes of all tensors, whose names (they change between versions of transformers) are left out."""
    hashes = sorted(
        hashlib.sha256(f"{list(tensor.shape)}".encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes()).digest()
        for tensor in model.state_dict().values()
    )
    return hashlib.sha256(b"".join(hashes)).hexdigest()
