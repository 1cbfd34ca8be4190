"""Packed, teacher-forced losses against the same losses computed here, one sample and one step at a time."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.data.render import render
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.evaluate import losses
from megatron_omni.evaluate.answers import chat
from megatron_omni.evaluate.losses import row_shape, teacher_forced, unigram_entropy
from megatron_omni.evaluate.samples import Selection, exchange_codes
from megatron_omni.export.modeling import OmniForConditionalGeneration
from megatron_omni.export.processing import OmniProcessor
from tests.evaluate.tiny import CARD, K, MemorySamples


def cross_entropy(logits: torch.Tensor, target: int) -> tuple[float, bool]:
    return float(F.cross_entropy(logits[None], torch.tensor([target]))), int(logits.argmax()) == target


@torch.inference_mode()
def one_by_one(
    model: OmniForConditionalGeneration, processor: OmniProcessor, tokenizer: OmniTokenizer, samples: Selection
) -> dict[str, list[tuple[float, bool]]]:
    """(loss, correct) of every target: ``text``, ``end`` and ``0``, ``1``, ... for the codebooks."""
    found: dict[str, list[tuple[float, bool]]] = {name: [] for name in ("text", "end", *map(str, range(K)))}
    head, delay = model.audio_head, model.config.model.audio_head.acoustic_delay
    for number in range(len(samples)):
        rendered = render(samples.sample(number), tokenizer, EncoderGeometry.of(model.config.model))
        inputs = dict(processor(chat(samples, number)))
        inputs.pop("attention_mask")
        # the question as for generation, then the tokens of the answer
        rest = torch.from_numpy(rendered.token_ids[inputs["input_ids"].shape[1] :].astype(np.int64))[None]
        embeds = torch.cat([model.embed(**inputs), model.get_input_embeddings()(rest)], 1)
        hidden_TD = model.llm.model(inputs_embeds=embeds).last_hidden_state[0]
        for position in np.flatnonzero(rendered.loss_mask):
            found["text"].append(cross_entropy(model.llm.lm_head(hidden_TD[position - 1]), int(rendered.token_ids[position])))
        for span in rendered.speech:
            codes_KT = samples.arrays(number).codes[span.name].astype(np.int64)
            alone = span.start == span.stop
            spoken_PD = torch.zeros(1, hidden_TD.shape[1]) if alone else hidden_TD[span.start : span.stop]
            P, T = len(spoken_PD), codes_KT.shape[1]
            prefix = head.pre_nn(spoken_PD[None], torch.full((1, P), alone), torch.arange(P)[None], None)
            steps = max(T + 1, T + delay)
            delayed = np.full((K, steps), -1)
            for k in range(K):
                lag = delay if k else 0
                delayed[k, lag : lag + T] = codes_KT[k]
            inputs_KF = torch.from_numpy(np.concatenate([np.full((K, P), -1), delayed[:, :-1]], 1))
            F_ = inputs_KF.shape[1]
            prefix = torch.cat([prefix, torch.zeros(1, F_ - P, prefix.shape[-1])], 1)
            state_FD = head.decoder(prefix, inputs_KF[None], torch.arange(F_)[None], None)[0]
            for step in range(steps):
                state_1D = state_FD[P - 1 + step][None]
                read = torch.from_numpy(delayed[:, step].copy())
                if step <= T:
                    read[0] = CARD if step == T else read[0]
                    found["end" if step == T else "0"].append(cross_entropy(head.semantic_head.logits(state_1D, 0)[0], int(read[0])))
                for k in range(1, K):
                    if delay <= step < T + delay:
                        logits_V = head.acoustic_head.logits(head.depformer(state_1D, read[None, :k])[:, -1], k - 1)[0]
                        found[str(k)].append(cross_entropy(logits_V, int(read[k])))
    return found


def mean(values: list[tuple[float, bool]]) -> tuple[float, float]:
    return tuple(np.mean(values, axis=0).tolist())  # type: ignore[return-value]


def test_losses_equal_those_of_each_sample_alone(
    model: OmniForConditionalGeneration,
    processor: OmniProcessor,
    tokenizer: OmniTokenizer,
    samples: MemorySamples,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(losses, "ROW_POSITIONS", 100)  # several rows of several samples
    donors = exchange_codes(samples.samples)
    assert donors is not None
    own, swapped = Selection(samples, range(len(samples))), Selection(samples, range(len(samples)), donors)
    sums = teacher_forced(model, tokenizer, own, "")
    scores = sums.codec(teacher_forced(model, tokenizer, swapped, ""))
    assert scores is not None and scores.loss_swapped_text is not None

    alone = one_by_one(model, processor, tokenizer, own)
    assert (sums.text_loss, sums.text_accuracy) == pytest.approx(mean(alone["text"]), abs=1e-5)
    assert sums.text_count == len(alone["text"])
    assert (scores.end_loss, scores.end_accuracy) == pytest.approx(mean(alone["end"]), abs=1e-5)
    exchanged = one_by_one(model, processor, tokenizer, swapped)
    for k in range(K):
        assert (scores.loss[k], scores.accuracy[k]) == pytest.approx(mean(alone[str(k)]), abs=1e-5)
        assert scores.loss_swapped_text[k] == pytest.approx(mean(exchanged[str(k)])[0], abs=1e-5)
        assert abs(scores.loss_swapped_text[k] - scores.loss[k]) > 1e-3
        codes = np.concatenate([codes[k] for arrays in samples.contents for codes in arrays.codes.values()]).tolist()
        shares = [count / len(codes) for count in Counter(codes).values()]
        assert scores.entropy[k] == pytest.approx(-sum(share * math.log(share) for share in shares))
        assert scores.frames == len(codes) == len(alone[str(k)])


def test_sums_add_up_over_any_split(model: OmniForConditionalGeneration, tokenizer: OmniTokenizer, samples: MemorySamples) -> None:
    whole = teacher_forced(model, tokenizer, samples, "")
    parts = [teacher_forced(model, tokenizer, Selection(samples, numbers), "") for numbers in (range(5), range(5, 24))]
    joined = parts[0] + parts[1]
    assert (joined.text_count, joined.text_correct, joined.end_correct) == (whole.text_count, whole.text_correct, whole.end_correct)
    assert (joined.histogram_KV == whole.histogram_KV).all()
    np.testing.assert_allclose(joined.codec_sum_K, whole.codec_sum_K, rtol=1e-5)


def test_without_codes_there_are_no_codec_scores(
    model: OmniForConditionalGeneration, tokenizer: OmniTokenizer, samples: MemorySamples
) -> None:
    sums = teacher_forced(model, tokenizer, Selection(samples, range(0, 24, 4)), "")
    assert sums.text_count > 0 and sums.codec() is None


def test_entropy() -> None:
    assert unigram_entropy(np.array([5, 5, 5, 5])) == pytest.approx(math.log(4))
    assert unigram_entropy(np.array([0, 7])) == 0.0
    assert unigram_entropy(np.zeros(3, np.int64)) == 0.0


def test_rows_hold_the_largest_sample() -> None:
    demands = np.array([[10, 0, 30, 0, 3], [700, 90, 41, 20, 130]])
    shape = row_shape(demands, stack=4)
    assert (shape.seq, shape.codec, shape.encoder, shape.spoken, shape.supervised) == (700, 98, 80, 22, 256)
