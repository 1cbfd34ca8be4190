"""Step-by-step decoding against the teacher-forced pass, and the choice of codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_omni.audio.delay import delay_codes
from megatron_omni.config.model import AudioHeadConfig, CodecConfig, TransformerConfig
from megatron_omni.generate.sampling import Sampler, greedy
from megatron_omni.generate.speech import decode_speech
from megatron_omni.model.audio_head import AudioHead
from megatron_omni.parallel.layers import layout_of
from megatron_omni.parallel.topology import TensorParallel
from megatron_omni.runtime.seeds import generator, rng

K, CARD, WIDTH = 4, 16, 24


def stack(width: int, layers: int, causal: bool = True) -> TransformerConfig:
    return TransformerConfig(hidden_size=width, num_layers=layers, num_heads=4, num_kv_heads=2, intermediate_size=2 * width, causal=causal)


@pytest.fixture(scope="module")
def head() -> AudioHead:
    config = AudioHeadConfig(pre_nn=stack(32, 1, causal=False), decoder=stack(40, 2), depformer=stack(32, 2))
    module = AudioHead(config, CodecConfig(num_codebooks=K, card=CARD, frame_rate=12.5, sample_rate=24000), WIDTH, TensorParallel.single())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(layout_of(parameter).shape, generator=generator("head", name)) / 5)
    return module.eval()


def teacher_forced(head: AudioHead, hidden_PD: torch.Tensor, codes_KT: np.ndarray, delay: int) -> list[torch.Tensor]:
    """Logits [S, V] of each codebook from one pass over the whole speech, written from the definition of a segment."""
    delayed_KS = torch.from_numpy(delay_codes(codes_KT, delay))
    P, S, T = max(1, len(hidden_PD)), delayed_KS.shape[1], codes_KT.shape[1]
    hidden_1PD = hidden_PD[None] if len(hidden_PD) else torch.zeros(1, 1, WIDTH)
    prefix = head.pre_nn(hidden_1PD, torch.full((1, P), len(hidden_PD) == 0), torch.arange(P)[None], None)
    prefix = torch.cat([prefix, torch.zeros(1, S - 1, prefix.shape[-1])], 1)
    codes = torch.cat([torch.full((K, P), -1), delayed_KS[:, :-1]], 1)[None]
    state_SD = head.decoder(prefix, codes, torch.arange(P + S - 1)[None], None)[0, P - 1 :]
    targets_SK = delayed_KS.T.clone()
    targets_SK[T, 0] = CARD
    acoustic = head.depformer(state_SD, targets_SK[:, :-1])
    return [head.semantic_head.logits(state_SD, 0), *(head.acoustic_head.logits(acoustic[:, k], k) for k in range(K - 1))]


@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize("lengths", [(5, 5), (0, 3)])
def test_steps_see_what_training_showed_them(head: AudioHead, delay: int, lengths: tuple[int, int]) -> None:
    random = rng("speech", delay, *lengths)
    texts = [torch.from_numpy(random.standard_normal((length, WIDTH)).astype(np.float32)) for length in lengths]
    speeches = [random.integers(0, CARD, (K, frames)) for frames in (4, 7)]  # one ends before the other
    seen: dict[tuple[int, int], list[torch.Tensor]] = {}

    def forced(batch: list[int]):  # type: ignore[no-untyped-def]
        calls = dict.fromkeys(range(K), 0)

        def choose(logits_NV: torch.Tensor, codebook: int) -> torch.Tensor:
            step = calls[codebook] + (delay if codebook else 0)
            calls[codebook] += 1
            chosen = []
            for row, index in enumerate(batch):
                seen.setdefault((index, codebook), []).append(logits_NV[row])
                wanted = delay_codes(speeches[index], delay)
                frames = speeches[index].shape[1]
                code = int(wanted[codebook, step]) if step < wanted.shape[1] else -1
                chosen.append(CARD if codebook == 0 and step == frames else code)
            return torch.tensor(chosen)

        return choose

    if lengths[0] == lengths[1]:
        decoded = decode_speech(head, texts, delay, 20, forced([0, 1]))
    else:
        decoded = [decode_speech(head, [texts[index]], delay, 20, forced([index]))[0] for index in (0, 1)]
    for index, (text, codes_KT) in enumerate(zip(texts, speeches, strict=True)):
        np.testing.assert_array_equal(decoded[index], codes_KT)
        T = codes_KT.shape[1]
        for k, expected_SV in enumerate(teacher_forced(head, text, codes_KT, delay)):
            steps = range(T + 1) if k == 0 else range(delay, T + delay)  # where codebook k has a target
            first = 0 if k == 0 else delay
            for step in steps:
                got_V, expected_V = seen[index, k][step - first].clone(), expected_SV[step].clone()
                if k == 0 and step == 0:
                    assert got_V[CARD] == -torch.inf  # at least one frame
                    got_V, expected_V = got_V[:CARD], expected_V[:CARD]
                torch.testing.assert_close(got_V, expected_V, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_speech_that_does_not_end_is_cut(head: AudioHead, delay: int) -> None:
    def never_end(logits_NV: torch.Tensor, codebook: int) -> torch.Tensor:
        return logits_NV[:, :CARD].argmax(-1)

    (codes_KT,) = decode_speech(head, [torch.zeros(3, WIDTH)], delay, 5, never_end)
    assert codes_KT.shape == (K, 5)
    assert codes_KT.min() >= 0
    assert codes_KT.max() < CARD


def test_a_batch_of_mixed_lengths_equals_one_by_one(head: AudioHead) -> None:
    texts = [torch.randn(length, WIDTH, generator=generator("text", number)) for number, length in enumerate([4, 2, 4, 0, 2, 4])]
    together = decode_speech(head, texts, 1, 12)
    for text, codes_KT in zip(texts, together, strict=True):
        np.testing.assert_array_equal(decode_speech(head, [text], 1, 12)[0], codes_KT)


def test_sampling_stays_within_top_k_and_follows_its_seed() -> None:
    logits_NV = torch.randn(400, 30, generator=generator("logits"))
    best = logits_NV.topk(3).indices
    codes = Sampler(1.0, 3, torch.Generator().manual_seed(5))(logits_NV, 0)
    assert (codes[:, None] == best).any(1).all()
    assert len({int(where) for where in (codes[:, None] == best).int().argmax(1)}) == 3  # not always the best
    torch.testing.assert_close(codes, Sampler(1.0, 3, torch.Generator().manual_seed(5))(logits_NV, 0))
    acoustic_greedy = Sampler(1.0, 0, torch.Generator().manual_seed(5), acoustic_temperature=0.0)
    torch.testing.assert_close(acoustic_greedy(logits_NV, 2), greedy(logits_NV, 2))
    assert not torch.equal(acoustic_greedy(logits_NV, 0), greedy(logits_NV, 0))
