"""Mimi's layers from Kyutai's ``moshi`` package, with the same weights: a key map carries them from and to ``transformers``.

``moshi`` pins an older torch; it works with newer ones when it is installed without its pins:
``pip install --no-deps moshi`` and ``pip install einops sentencepiece sphn``.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import MimiConfig, MimiModel

from megatron_omni.audio.codebooks import SplitCodebooks
from megatron_omni.audio.mimi_transformers import TransformersMimi, split_codebooks
from megatron_omni.runtime.errors import InputError

_NAMES = (
    # newer versions of transformers nest the parts of the encoder and the decoder
    (r"^(encoder|decoder)\.\1_seanet\.", r"\1."),
    (r"^(?:encoder|decoder)\.((?:encoder|decoder)_transformer|downsample|upsample)\.", r"\1."),
    (r"^((?:encoder|decoder)_transformer)\.layers\.", r"\1.transformer.layers."),
    (r"\.self_attn\.o_proj\.", ".self_attn.out_projs.0."),
    (r"\.self_attn\.([qkv])_proj\.", r".self_attn.\1_proj."),
    (r"\.mlp\.fc([12])\.", r".linear\1."),
    (r"\.input_layernorm\.", ".norm1."),
    (r"\.post_attention_layernorm\.", ".norm2."),
    (r"\.self_attn_layer_scale\.", ".layer_scale_1."),
    (r"\.mlp_layer_scale\.", ".layer_scale_2."),
    (r"^quantizer\.semantic_residual_vector_quantizer\.", "quantizer.rvq_first."),
    (r"^quantizer\.acoustic_residual_vector_quantizer\.", "quantizer.rvq_rest."),
    (r"^(quantizer\.rvq_\w+)\.layers\.(\d+)\.codebook\.", r"\1.vq.layers.\2._codebook."),
    (r"\._codebook\.embed_sum$", "._codebook.embedding_sum"),
    (r"\._codebook\.initialized$", "._codebook._initialized"),
    (r"^downsample\.conv\.", "downsample.conv.conv.conv."),
    (r"^upsample\.conv\.", "upsample.convtr.convtr.convtr."),
    (r"^(encoder|decoder)\.layers\.", r"\1.model."),
)
"""Applied in this order to a name of ``transformers``."""

_QKV = re.compile(r"(.*\.self_attn\.)([qkv])_proj\.weight$")


class MoshiMimi:
    """A ``codec.MimiNetwork``."""

    def __init__(self, config: MimiConfig, state: Mapping[str, torch.Tensor]) -> None:
        """``state`` is in the layout of ``transformers``."""
        self.num_semantic: int = config.num_semantic_quantizers
        self.num_codebooks: int = config.num_quantizers
        self.card: int = config.codebook_size
        self.sample_rate: int = config.sampling_rate
        self.frame_rate = float(config.frame_rate)
        self._state = state
        self.model = _moshi_model(config)
        self.model.load_state_dict(to_moshi(state, config.num_attention_heads, list(self.model.state_dict())))
        self.model.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder_or_id: str | Path) -> MoshiMimi:
        """From a folder or id of ``transformers``, or Kyutai's ``.safetensors`` of the published size; raises as ``load_codec``."""
        if Path(folder_or_id).suffix == ".safetensors":
            config = MimiConfig()
            try:
                state = from_moshi(load_file(folder_or_id), config)
            except (OSError, ValueError, KeyError) as error:
                raise InputError(f"codec {folder_or_id}: cannot be loaded ({error!r}); give the file of moshi's codec") from error
            return cls(config, state)
        loaded = TransformersMimi.load(folder_or_id)
        return cls(loaded.model.config, loaded.state())

    @cached_property
    def codebooks(self) -> SplitCodebooks:
        device = next(self.model.parameters()).device
        return split_codebooks({name: tensor.to(device) for name, tensor in self._state.items() if name.startswith("quantizer.")})

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self.model.to(device, dtype)

    def latents(self, waves_B1W: torch.Tensor) -> torch.Tensor:
        latents_BDT: torch.Tensor = self.model.encode_to_latent(waves_B1W, quantize=False)
        return latents_BDT.transpose(1, 2)

    def decode(self, codes_1KT: torch.Tensor) -> torch.Tensor:
        audio: torch.Tensor = self.model.decode(codes_1KT)
        return audio

    def state(self) -> Mapping[str, torch.Tensor]:
        return self._state


def to_moshi(state: Mapping[str, torch.Tensor], num_heads: int, names: list[str]) -> dict[str, torch.Tensor]:
    """The weights of ``transformers`` under moshi's ``names``."""
    renamed: dict[str, torch.Tensor] = {}
    fused: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        new = name
        for pattern, replacement in _NAMES:
            new = re.sub(pattern, replacement, new)
        if match := _QKV.fullmatch(new):
            fused.setdefault(f"{match[1]}in_projs.0.weight", {})[match[2]] = tensor
        else:
            renamed[new] = tensor
    for name, parts in fused.items():
        renamed[name] = torch.cat([_interleaved(parts["q"], num_heads), _interleaved(parts["k"], num_heads), parts["v"]])
    # The convolutions of SEANet are wrapped once or twice, plain or transposed; only moshi's own names tell which.
    short = {re.sub(r"\.(conv|convtr)\.\1\.(weight|bias)$", r".conv.\2", name): name for name in names if re.match(r"(en|de)coder\.", name)}
    return {short.get(name, name): tensor for name, tensor in renamed.items()}


def from_moshi(state: Mapping[str, torch.Tensor], config: MimiConfig) -> dict[str, torch.Tensor]:
    """The weights of moshi under the names of ``transformers``: the inverse of ``to_moshi``.

    Raises:
        KeyError: A weight is missing.
    """
    with torch.device("meta"):
        expected = MimiModel(config).state_dict()
    # Each expected tensor is followed through the map as a number, so that the map itself is the only table.
    numbers = {name: torch.tensor(float(number)) for number, name in enumerate(expected) if not _QKV.fullmatch(name)}
    targets = {int(number): name for name, number in to_moshi(numbers, config.num_attention_heads, list(state)).items()}
    found: dict[str, torch.Tensor] = {}
    for number, name in enumerate(expected):
        if match := _QKV.fullmatch(name):
            prefix = re.sub(r"^(?:encoder|decoder)\.((?:encoder|decoder)_transformer)\.", r"\1.", match[1])
            fused = state[f"{re.sub(r'_transformer[.]layers[.]', '_transformer.transformer.layers.', prefix)}in_projs.0.weight"]
            part = fused.chunk(3)["qkv".index(match[2])]
            found[name] = part if match[2] == "v" else _deinterleaved(part, config.num_attention_heads)
        else:
            found[name] = state[targets[number]]
    return found


def _interleaved(weight_OI: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rotary pairs from (d, d + head / 2) to (2d, 2d + 1)."""
    out, into = weight_OI.shape
    return weight_OI.view(num_heads, 2, out // num_heads // 2, into).transpose(1, 2).reshape(out, into)


def _deinterleaved(weight_OI: torch.Tensor, num_heads: int) -> torch.Tensor:
    out, into = weight_OI.shape
    return weight_OI.view(num_heads, out // num_heads // 2, 2, into).transpose(1, 2).reshape(out, into)


def _moshi_model(config: MimiConfig) -> Any:
    """An empty ``moshi`` codec of the shape of ``config``."""
    try:
        compression = importlib.import_module("moshi.models.compression")
        modules = importlib.import_module("moshi.modules")
        quantization = importlib.import_module("moshi.quantization")
    except ImportError as error:
        raise InputError(
            f"the codec backend 'moshi' is not usable here ({error}); pip install --no-deps moshi, and einops sentencepiece sphn, "
            "or take the backend 'transformers', which gives the same codes"
        ) from error
    seanet = {
        "channels": config.audio_channels,
        "dimension": config.hidden_size,
        "causal": config.use_causal_conv,
        "n_filters": config.num_filters,
        "n_residual_layers": config.num_residual_layers,
        "activation": "ELU",
        "compress": config.compress,
        "dilation_base": config.dilation_growth_rate,
        "disable_norm_outer_blocks": 0,
        "kernel_size": config.kernel_size,
        "residual_kernel_size": config.residual_kernel_size,
        "last_kernel_size": config.last_kernel_size,
        "norm": "none",
        "pad_mode": config.pad_mode,
        "ratios": list(config.upsampling_ratios or ()),
        "true_skip": not config.use_conv_shortcut,
    }
    rope = getattr(config, "rope_parameters", None) or {}
    transformer = {
        "d_model": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "causal": True,
        "layer_scale": config.layer_scale_initial_scale,
        "context": config.sliding_window,
        "conv_layout": True,
        "max_period": rope.get("rope_theta", getattr(config, "rope_theta", 10_000.0)),
        "gating": "none",
        "norm": "layer_norm",
        "positional_embedding": "rope",
        "dim_feedforward": config.intermediate_size,
        "input_dimension": config.hidden_size,
        "output_dimensions": [config.hidden_size],
    }
    encoder, decoder = modules.SEANetEncoder(**seanet), modules.SEANetDecoder(**seanet)
    return compression.MimiModel(
        encoder,
        decoder,
        quantization.SplitResidualVectorQuantizer(
            dimension=config.vector_quantization_hidden_dimension,
            n_q=config.num_quantizers,
            n_q_semantic=config.num_semantic_quantizers,
            bins=config.codebook_size,
            input_dimension=config.hidden_size,
            output_dimension=config.hidden_size,
        ),
        channels=config.audio_channels,
        sample_rate=config.sampling_rate,
        frame_rate=config.frame_rate,
        encoder_frame_rate=config.sampling_rate / encoder.hop_length,
        causal=True,
        resample_method="conv",
        encoder_transformer=modules.transformer.ProjectedTransformer(**transformer),
        decoder_transformer=modules.transformer.ProjectedTransformer(**transformer),
    )
