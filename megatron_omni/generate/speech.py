"""Speech from the hidden states of a spoken text: the codec decoder frame by frame, the Depformer codebook by codebook.

Step ``s`` gives codebook 0 of frame ``s`` and the other codebooks of frame ``s - delay``. Codebook 0's extra entry ends
the speech after ``T`` frames; the other codebooks then catch up. What each step reads is what training showed it there
(``model/audio_head.py``): nothing before the delayed codebooks begin, the end entry once, nothing after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_omni.audio.delay import NO_CODE, num_steps, undelay_codes
from megatron_omni.generate.sampling import Choose, greedy
from megatron_omni.model.audio_head import AudioHead
from megatron_omni.model.transformer import KeyValueCache


@torch.inference_mode()
def decode_speech(
    head: AudioHead, spoken: Sequence[torch.Tensor], acoustic_delay: int, max_frames: int, choose: Choose = greedy
) -> list[np.ndarray]:
    """Codes ``[K, T]`` int64 of each text, ``1 <= T <= max_frames``.

    Args:
        head: a whole (not tensor-parallel) audio head.
        spoken: per text the LLM's hidden states ``[P, D]`` at the positions that have read its tokens, end of turn
            included; ``[0, D]`` for speech without text. Texts of one length are decoded together.
    """
    lengths = [len(hidden) for hidden in spoken]
    codes: list[np.ndarray] = [np.empty(0)] * len(spoken)
    for length in sorted(set(lengths)):
        members = [index for index, other in enumerate(lengths) if other == length]
        batch = torch.stack([spoken[index] for index in members])
        for index, decoded in zip(members, _decode_batch(head, batch, acoustic_delay, max_frames, choose), strict=True):
            codes[index] = decoded
    return codes


def _decode_batch(head: AudioHead, hidden_BPD: torch.Tensor, delay: int, max_frames: int, choose: Choose) -> list[np.ndarray]:
    """The same for texts of one length."""
    device, B = hidden_BPD.device, len(hidden_BPD)
    K, end = head.decoder.codes.weight.shape[:2]
    prefix_BPD = _prefix(head, hidden_BPD)
    P = prefix_BPD.shape[1]
    cache = KeyValueCache()
    nothing_BKP = torch.full((B, K, P), NO_CODE, device=device)
    state_BD = head.decoder(prefix_BPD, nothing_BKP, torch.arange(P, device=device).expand(B, P), None, cache)[:, -1]

    frames_B = torch.full((B,), max_frames, device=device)  # where each speech ends, as far as is known
    steps: list[torch.Tensor] = []
    step = 0
    while step < num_steps(int(frames_B.max()), delay):
        if step:
            position_B1 = torch.full((B, 1), P + step - 1, device=device)
            no_prefix_B1D = state_BD.new_zeros(B, 1, state_BD.shape[-1])
            state_BD = head.decoder(no_prefix_B1D, steps[-1].unsqueeze(-1), position_B1, None, cache)[:, -1]
        codes_BK = torch.full((B, K), NO_CODE, device=device)
        logits_BV = head.semantic_head.logits(state_BD, 0)
        if step == 0:
            logits_BV[:, end] = -torch.inf  # speech has at least one frame
        first_B = choose(logits_BV, 0)
        frames_B = torch.where((frames_B > step) & (first_B == end), step, frames_B)
        # the Depformer reads the end entry at the step that ends the speech, the decoder never does
        codes_BK[:, 0] = torch.where(frames_B > step, first_B, torch.where(frames_B == step, end, NO_CODE))
        if step >= delay:
            for k in range(1, K):
                hidden_BKH = head.depformer(state_BD, codes_BK[:, :k])
                code_B = choose(head.acoustic_head.logits(hidden_BKH[:, -1], k - 1), k)
                codes_BK[:, k] = torch.where(frames_B + delay > step, code_B, NO_CODE)
        codes_BK[:, 0] = codes_BK[:, 0].where(frames_B > step, NO_CODE)
        steps.append(codes_BK)
        step += 1
    delayed_BKS = torch.stack(steps, -1).cpu().numpy()
    return [undelay_codes(row[:, : num_steps(frames, delay)], delay) for row, frames in zip(delayed_BKS, frames_B.tolist(), strict=True)]


def _prefix(head: AudioHead, hidden_BPD: torch.Tensor) -> torch.Tensor:
    """What the decoder reads before the frames; without text one learned vector."""
    B, P, D = hidden_BPD.shape
    learned = P == 0
    if learned:
        hidden_BPD, P = hidden_BPD.new_zeros(B, 1, D), 1
    device = hidden_BPD.device
    learned_BP = torch.full((B, P), learned, device=device)
    prefix_BPD: torch.Tensor = head.pre_nn(hidden_BPD, learned_BP, torch.arange(P, device=device).expand(B, P), None)
    return prefix_BPD
