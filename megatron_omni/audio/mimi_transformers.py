"""Mimi's layers from ``transformers`` (the default)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, MimiModel

from megatron_omni.audio.codebooks import ResidualCodebooks, SplitCodebooks
from megatron_omni.runtime.errors import InputError


class TransformersMimi:
    """A ``codec.MimiNetwork``."""

    def __init__(self, model: MimiModel) -> None:
        config = model.config
        self.num_semantic: int = config.num_semantic_quantizers
        self.num_codebooks: int = config.num_quantizers
        self.card: int = config.codebook_size
        self.sample_rate: int = config.sampling_rate
        self.frame_rate = float(config.frame_rate)
        self.model = model
        module: torch.nn.Module = model
        module.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder_or_id: str | Path) -> TransformersMimi:
        """Loads safetensors weights in float32; raises as ``codec.load_codec`` does."""
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
        return cls(model)

    @cached_property
    def codebooks(self) -> SplitCodebooks:
        return split_codebooks(self.state())

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        module: torch.nn.Module = self.model
        module.to(device, dtype)

    def latents(self, waves_B1W: torch.Tensor) -> torch.Tensor:
        heard: list[torch.Tensor] = []

        def listen(latents_BDT: torch.Tensor, _num_quantizers: int | None = None) -> torch.Tensor:
            heard.append(latents_BDT.transpose(1, 2))
            return latents_BDT.new_zeros((1, latents_BDT.shape[0], latents_BDT.shape[2]), dtype=torch.long)

        # The names of the encoder's parts differ between versions; that ``encode`` hands its latents to the quantizer does not.
        quantizer: Any = self.model.quantizer
        quantizer.encode = listen
        try:
            self.model.encode(waves_B1W, num_quantizers=self.num_semantic)
        finally:
            del quantizer.encode
        return heard[0]

    def decode(self, codes_1KT: torch.Tensor) -> torch.Tensor:
        audio: torch.Tensor = self.model.decode(codes_1KT).audio_values
        return audio

    def state(self) -> Mapping[str, torch.Tensor]:
        return self.model.state_dict()


def split_codebooks(state: Mapping[str, torch.Tensor]) -> SplitCodebooks:
    """The quantizer of a state in the layout of ``transformers``."""
    semantic, acoustic = (_residual_codebooks(state, f"quantizer.{name}_residual_vector_quantizer.") for name in _PARTS)
    return SplitCodebooks(semantic, acoustic)


_PARTS = ("semantic", "acoustic")
_EPSILON = 1e-5
"""Least usage of an entry, as in the model."""


def _residual_codebooks(state: Mapping[str, torch.Tensor], prefix: str) -> ResidualCodebooks:
    project = state.get(f"{prefix}input_proj.weight")
    entries: list[torch.Tensor] = []
    while (name := f"{prefix}layers.{len(entries)}.codebook.") + "embed_sum" in state:
        usage_V = state[f"{name}cluster_usage"].float().clamp(min=_EPSILON)
        entries.append((state[f"{name}embed_sum"].float() / usage_V[:, None]).double())
    return ResidualCodebooks(None if project is None else project[:, :, 0].double(), entries)
