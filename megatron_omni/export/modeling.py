"""``OmniForConditionalGeneration``: an exported model as transformers knows models. Audio and text in, text and speech out.

The LLM is the stock ``LlamaForCausalLM``, so generation, its caches, sampling and streaming are transformers' own; the
codec is the stock ``MimiModel``. Encoder, projector and audio head are the modules that were trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import GenerationMixin, LlamaForCausalLM, MimiModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from megatron_omni.audio.codec import Mimi
from megatron_omni.export.configuration import OmniConfig
from megatron_omni.generate.sampling import Choose, Sampler, greedy
from megatron_omni.generate.speech import decode_speech
from megatron_omni.kernels.attention import Segments
from megatron_omni.kernels.losses import LossOptions
from megatron_omni.kernels.text_head import text_head
from megatron_omni.model.audio_head import AudioHead
from megatron_omni.model.encoder import AudioEncoder, Projector
from megatron_omni.model.init import initial_value
from megatron_omni.model.positions import place_audio, take
from megatron_omni.parallel.layout import TensorLayout
from megatron_omni.parallel.topology import TensorParallel
from megatron_omni.runtime.errors import InputError
from megatron_omni.schema import Batch, LossScale, StepLosses


@dataclass(frozen=True)
class OmniSpeech:
    """What ``generate_speech`` returns, one entry per conversation."""

    sequences: torch.Tensor
    """int64 [B, new tokens]: the answers' token ids, end of turn included, the pad id after it."""
    codes: list[np.ndarray]
    """int64 [K, T]."""
    waves: list[np.ndarray]
    """float32 [W] at ``sample_rate``."""
    sample_rate: int
    """Hz."""


class OmniForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """See the module's docstring. Inputs come from ``OmniProcessor``; ``from_pretrained`` refuses incomplete weights."""

    config_class = OmniConfig
    config: OmniConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = False  # packed rows are told apart by a 4D mask
    _keep_in_fp32_modules_strict = ["codec"]  # noqa: RUF012 - an attribute of the base class

    def __init__(self, config: OmniConfig) -> None:
        super().__init__(config)
        model = config.model
        if model.codec is None:
            raise InputError("config.json: omni.codec is empty; export the model with tools/convert_checkpoint.py to-hf")
        single, width = TensorParallel.single(), model.llm.stack.hidden_size
        self.encoder = AudioEncoder(model.encoder, model.features)
        self.projector = Projector(model.projector, model.encoder.stack.hidden_size, width)
        self.llm = LlamaForCausalLM(config.llm_config)
        self.audio_head = AudioHead(model.audio_head, model.codec, width, single)
        self.codec = MimiModel(config.codec_config)
        for name, parameter in self.named_parameters():
            # built by from_pretrained, they are on the meta device and come from files
            if name.startswith(("encoder.", "projector.", "audio_head.")) and parameter.device.type != "meta":
                parameter.data.copy_(initial_value(name, TensorLayout(tuple(parameter.shape)), model, seed=0))
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder_or_id: str | Path, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As of any transformers model, but weights that the files lack, or hold in another shape, are an ``InputError``."""
        try:
            loaded: Any = super().from_pretrained(folder_or_id, *args, output_loading_info=True, **kwargs)
        except OSError as error:  # transformers says in it which file is not there
            raise InputError(f"no exported model at {folder_or_id}: {error}") from error
        model, info = loaded
        faults = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys", "unexpected_keys") if info[kind]}
        if faults:
            raise InputError(f"{folder_or_id}: the weights do not fit the configuration: {faults}; export the checkpoint again")
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: our own modules get their weights in ``__init__`` or from files; the LLM and the codec see to theirs."""

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.llm.get_output_embeddings()

    # ------------------------------------------------------------------ text

    def embed(
        self,
        input_ids: torch.Tensor,
        mel_RAM: torch.Tensor,
        mel_valid_RA: torch.Tensor,
        clip_segments_RA: torch.Tensor,
        clip_positions_RA: torch.Tensor,
        audio_source_BT: torch.Tensor,
    ) -> torch.Tensor:
        """Token embeddings with projected audio in the place of the ``<audio>`` positions, ``[B, T, D]``; see ``schema.Batch``."""
        frames = self.encoder(mel_RAM.to(self.dtype), mel_valid_RA, clip_segments_RA, clip_positions_RA)
        audio_XD = self.projector(frames, clip_segments_RA).flatten(0, 1)
        return place_audio(self.get_input_embeddings()(input_ids), audio_XD, audio_source_BT)

    def forward(
        self,
        input_ids: torch.Tensor,
        mel_RAM: torch.Tensor,
        mel_valid_RA: torch.Tensor,
        clip_segments_RA: torch.Tensor,
        clip_positions_RA: torch.Tensor,
        audio_source_BT: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """Text logits ``[B, T, V]`` of whole conversations."""
        embeds = self.embed(input_ids, mel_RAM, mel_valid_RA, clip_segments_RA, clip_positions_RA, audio_source_BT)
        return cast(
            CausalLMOutputWithPast, self.llm(inputs_embeds=embeds, attention_mask=attention_mask, position_ids=_positions(attention_mask))
        )

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        mel_RAM: torch.Tensor,
        mel_valid_RA: torch.Tensor,
        clip_segments_RA: torch.Tensor,
        clip_positions_RA: torch.Tensor,
        audio_source_BT: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Ids of the answers alone, int64 ``[B, new tokens]``. ``options`` are those of transformers' ``generate``."""
        embeds = self.embed(input_ids, mel_RAM, mel_valid_RA, clip_segments_RA, clip_positions_RA, audio_source_BT)
        return self._generate_text(embeds, attention_mask, **options)

    def _generate_text(self, embeds: torch.Tensor, attention_mask: torch.Tensor | None, **options: Any) -> torch.Tensor:
        self.llm.generation_config = self.generation_config
        ids: torch.Tensor = self.llm.generate(inputs_embeds=embeds, attention_mask=attention_mask, **options)  # type: ignore[misc, assignment]
        return ids

    # ------------------------------------------------------------------ speech

    @torch.no_grad()
    def generate_speech(
        self,
        input_ids: torch.Tensor,
        mel_RAM: torch.Tensor,
        mel_valid_RA: torch.Tensor,
        clip_segments_RA: torch.Tensor,
        clip_positions_RA: torch.Tensor,
        audio_source_BT: torch.Tensor,
        attention_mask: torch.Tensor,
        max_frames: int = 500,
        speech_temperature: float = 0.0,
        speech_top_k: int = 0,
        speech_seed: int = 0,
        **options: Any,
    ) -> OmniSpeech:
        """Answers in text, then says them.

        Args:
            max_frames: longest speech, in codec frames.
            speech_temperature: of all codebooks; 0 is greedy.
            speech_top_k: codes sampled from; 0: all.
            options: of transformers' ``generate``, for the text.
        """
        embeds = self.embed(input_ids, mel_RAM, mel_valid_RA, clip_segments_RA, clip_positions_RA, audio_source_BT)
        sequences = self._generate_text(embeds, attention_mask, **options)
        spoken = self._spoken_states(embeds, attention_mask, sequences)
        choose: Choose = greedy
        if speech_temperature:
            generator = torch.Generator().manual_seed(speech_seed)
            choose = Sampler(speech_temperature, speech_top_k, generator)
        codes = decode_speech(self.audio_head, spoken, self.config.model.audio_head.acoustic_delay, max_frames, choose)
        mimi = self.mimi()
        return OmniSpeech(sequences, codes, [mimi.decode(codes_KT) for codes_KT in codes], mimi.sample_rate)

    def mimi(self) -> Mimi:
        """The codec behind the interface that made the training targets."""
        codec = self.config.model.codec
        assert codec is not None
        return Mimi(self.codec, codec.num_codebooks, self.device)

    def _spoken_states(self, embeds: torch.Tensor, attention_mask: torch.Tensor, sequences: torch.Tensor) -> list[torch.Tensor]:
        """Per answer the hidden states ``[P, D]`` that have read its tokens, end of turn included (``schema.SpeechSpan``).

        An answer that was cut off gets its end of turn here; one without text has ``P = 0``.
        """
        end = self.config.llm_config.eos_token_id
        sequences = torch.cat([sequences, torch.full_like(sequences[:, :1], end)], 1)
        lengths = (sequences == end).int().argmax(1) + 1
        read = torch.arange(sequences.shape[1], device=sequences.device) < lengths.unsqueeze(1)
        mask = torch.cat([attention_mask, read.to(attention_mask.dtype)], 1)
        whole = torch.cat([embeds, self.get_input_embeddings()(sequences)], 1)
        output = self.llm.model(inputs_embeds=whole, attention_mask=mask, position_ids=_positions(mask), use_cache=False)
        answers = output.last_hidden_state[:, embeds.shape[1] :]
        return [hidden[:length] if length > 1 else hidden[:0] for hidden, length in zip(answers, lengths.tolist(), strict=True)]

    # ------------------------------------------------------------------ packed rows

    def packed_hidden_states(self, batch: Batch) -> torch.Tensor:
        """The LLM's last hidden states (normed) of packed rows ``[B, T, D]``: as ``OmniModel.hidden_states``, by the stock LLM."""
        embeds = self.embed(
            batch.tokens_BT, batch.mel_RAM, batch.mel_valid_RA, batch.clip_segments_RA, batch.clip_positions_RA, batch.audio_source_BT
        )
        sees = Segments(batch.segments_BT).mask_B1TT(causal=True)
        mask_B1TT = torch.zeros(sees.shape, dtype=embeds.dtype, device=embeds.device).masked_fill(~sees, torch.finfo(embeds.dtype).min)
        output = self.llm.model(inputs_embeds=embeds, attention_mask=mask_B1TT, position_ids=batch.positions_BT, use_cache=False)
        return cast(torch.Tensor, output.last_hidden_state)

    def packed_losses(self, batch: Batch, scale: LossScale | None = None) -> StepLosses:
        """Teacher-forced loss sums of packed rows, as ``OmniModel.forward`` gives them; ``loss`` is 0 without ``scale``."""
        codec = self.config.model.codec
        assert codec is not None
        scale = scale or LossScale(0.0, (0.0,) * codec.num_codebooks)
        options = LossOptions()
        hidden_BTD = self.packed_hidden_states(batch)
        hidden_UD = take(hidden_BTD, batch.supervised_BU).flatten(0, 1)
        text = text_head(hidden_UD, self.llm.lm_head.weight, batch.targets_BU.flatten(), scale.text, None, options)
        scale_K = torch.tensor(scale.codec, dtype=torch.float32, device=hidden_BTD.device)
        codec_loss, codec_sum_K, codec_correct_K = self.audio_head(hidden_BTD, batch, scale_K, options)
        return StepLosses(text.loss + codec_loss, text.sum_J[0], text.correct_J[0], codec_sum_K, codec_correct_K)


def _positions(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Position ids that count the attended positions from 0, whatever the padding before them."""
    return None if attention_mask is None else (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
