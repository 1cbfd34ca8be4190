"""The exported class: the training model's numbers, generation in batches, speech, and a machine without the engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from megatron_omni.audio.features import LogMel
from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.data.render import render
from megatron_omni.data.rows.collate import collate
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.export import OmniConfig, OmniForConditionalGeneration, OmniProcessor
from megatron_omni.export.verify import random_batch
from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.seeds import rng
from megatron_omni.schema import Counts, LossScale, Message, Part, RowShape, Sample, SampleArrays


@pytest.fixture(scope="module")
def model(exported) -> OmniForConditionalGeneration:  # type: ignore[no-untyped-def]
    loaded: OmniForConditionalGeneration = AutoModel.from_pretrained(exported.folder)
    return loaded.eval()


@pytest.fixture(scope="module")
def processor(exported) -> OmniProcessor:  # type: ignore[no-untyped-def]
    return AutoProcessor.from_pretrained(exported.folder)


def wave(seconds: float, seed: int = 0) -> np.ndarray:
    return rng("wave", seed).standard_normal(int(16000 * seconds)).astype(np.float32) / 10


def user(*parts: Any) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "audio", "audio": part} for part in parts]
    return [{"role": "user", "content": content}]


@torch.no_grad()
def test_packed_losses_are_those_of_the_training_model(trained, model: OmniForConditionalGeneration) -> None:  # type: ignore[no-untyped-def]
    batch = random_batch(trained.config, samples=5, seed=1)
    scale = LossScale.of(Counts.of(batch), 1.0, (1.0,) * trained.config.codec.num_codebooks, 1)
    ours, theirs = trained.model(batch, scale), model.packed_losses(batch, scale)
    assert float(ours.loss) > 1
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(other, mine, rtol=1e-5, atol=1e-5)


def test_the_processor_s_inputs_are_what_training_packs(trained, model: OmniForConditionalGeneration, processor: OmniProcessor) -> None:  # type: ignore[no-untyped-def]
    """Generation begins from the hidden states of a training row, and speech is conditioned on the same ones."""
    tokenizer, geometry = OmniTokenizer.load(trained.tokenizer), EncoderGeometry.of(trained.config)
    samples = []
    for number, (seconds, text) in enumerate([(0.61, "three five"), (1.0, "the weather is nice")]):
        audio, codes_KT = wave(seconds, number), rng("codes", number).integers(0, 16, (4, 6)).astype(np.uint16)
        turns = (
            Message("user", (Part("audio", "audio0"), Part("text", "Transcribe:"))),
            Message("assistant", (Part("text", text), Part("codes", "codes0"))),
        )
        sample = Sample(str(number), "transcribe", "", turns, {"audio0": len(audio)}, {"codes0": 6})
        samples.append((sample, render(sample, tokenizer, geometry), SampleArrays({"audio0": audio}, {"codes0": codes_KT})))
    shape = RowShape(seq=80, codec=60, encoder=120, spoken=40, supervised=128)
    delay = trained.config.audio_head.acoustic_delay
    batch = collate([samples], shape, geometry, LogMel(trained.config.features), trained.config.codec, delay, tokenizer.pad_id)
    inputs = processor([user(arrays.audio["audio0"], "Transcribe:") for _, _, arrays in samples])
    answers = [
        torch.from_numpy(rendered.token_ids[span.start : span.stop]).long() for _, rendered, _ in samples for span in rendered.speech
    ]
    sequences = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=tokenizer.pad_id)

    with torch.no_grad():
        hidden_TD = trained.model.hidden_states(batch)[0]
        embeds = model.embed(**{key: value for key, value in inputs.items() if key != "attention_mask"})
        spoken = model._spoken_states(embeds, inputs["attention_mask"], sequences)
        logits = model(**inputs).logits
    start = 0
    for index, (_, rendered, _) in enumerate(samples):
        (span,) = rendered.speech
        torch.testing.assert_close(spoken[index], hidden_TD[start + span.start : start + span.stop], atol=1e-5, rtol=0)
        at_header = hidden_TD[start + span.start - 1] @ trained.model.llm.head.weight.T
        torch.testing.assert_close(logits[index, -1], at_header, atol=1e-5, rtol=0)
        start += len(rendered.token_ids)


def test_a_batch_generates_what_single_conversations_do(model: OmniForConditionalGeneration, processor: OmniProcessor) -> None:
    chats = [user(wave(1.0), "Transcribe:"), user(wave(0.3, 1)), user("three five"), user(wave(0.5, 2), wave(0.7, 3))]
    together = model.generate(**processor(chats), max_new_tokens=8, min_new_tokens=8)
    for chat, ids in zip(chats, together, strict=True):
        alone = model.generate(**processor(chat), max_new_tokens=8, min_new_tokens=8)
        assert torch.equal(ids, alone[0])
    never = torch.tensor(model.generation_config.suppress_tokens)
    assert not torch.isin(together, never).any()
    assert len(processor.batch_decode(together)) == 4


def test_speech_in_a_batch_and_alone(model: OmniForConditionalGeneration, processor: OmniProcessor) -> None:
    chats = [user(wave(1.0), "Transcribe:"), user(wave(0.4, 1))]
    together = model.generate_speech(**processor(chats), max_new_tokens=5, max_frames=6)
    for index, chat in enumerate(chats):
        alone = model.generate_speech(**processor(chat), max_new_tokens=5, max_frames=6)
        np.testing.assert_array_equal(together.codes[index], alone.codes[0])
        K, T = together.codes[index].shape
        assert K == 4 and 1 <= T <= 6
        assert together.waves[index].shape == (T * 1920,)
        assert np.isfinite(together.waves[index]).all()


def test_an_answer_without_text_is_spoken_from_the_learned_vector(model: OmniForConditionalGeneration, processor: OmniProcessor) -> None:
    inputs = processor(user(wave(0.5)))
    embeds = model.embed(**{key: value for key, value in inputs.items() if key != "attention_mask"})
    end = model.config.llm_config.eos_token_id
    (nothing,) = model._spoken_states(embeds, inputs["attention_mask"], torch.tensor([[end, 0, 0]]))
    assert nothing.shape == (0, 64)
    (cut_off,) = model._spoken_states(embeds, inputs["attention_mask"], torch.tensor([[5, 6, 7]]))
    assert cut_off.shape == (4, 64)  # its end of turn was added


def test_missing_weights_are_an_error(exported, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for path in exported.folder.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(exported.folder / "model.safetensors")
    for victim in (
        "projector.norm.weight",
        "llm.model.norm.weight",
        "codec.quantizer.semantic_residual_vector_quantizer.output_proj.weight",
    ):
        save_file({name: t for name, t in tensors.items() if name != victim}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=victim.replace(".", r"\.")):
            OmniForConditionalGeneration.from_pretrained(tmp_path)


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no exported model"):
        OmniForConditionalGeneration.from_pretrained(tmp_path / "nowhere")


def test_a_model_from_its_configuration_alone_has_initial_weights(exported) -> None:  # type: ignore[no-untyped-def]
    with torch.device("cpu"):
        torch.empty(1 << 20).fill_(torch.nan)  # what uninitialised memory may hold
    fresh = OmniForConditionalGeneration(OmniConfig.from_pretrained(exported.folder))
    assert all(p.isfinite().all() for p in fresh.parameters())
    assert float(fresh.projector.up.weight.detach().std()) == pytest.approx(128**-0.5, rel=0.1)


def test_save_pretrained_round_trip(model: OmniForConditionalGeneration, processor: OmniProcessor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = OmniForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    inputs, same = processor(user(wave(0.5))), OmniProcessor.from_pretrained(tmp_path)(user(wave(0.5)))
    assert all(torch.equal(same[name], inputs[name]) for name in inputs)


def test_parts_that_a_turn_cannot_hold(processor: OmniProcessor) -> None:
    with pytest.raises(InputError, match="'image'"):
        processor([{"role": "user", "content": [{"type": "image", "image": "x.png"}]}])
    with pytest.raises(InputError, match="no such audio file"):
        processor(user(Path("nowhere.wav")))
    with pytest.raises(InputError, match="no conversation"):
        processor([])


WITHOUT_ENGINE = """
import sys
sys.modules["deepspeed"] = None  # importing it fails
import numpy as np
from megatron_omni.export import OmniForConditionalGeneration, OmniProcessor
model = OmniForConditionalGeneration.from_pretrained(sys.argv[1])
processor = OmniProcessor.from_pretrained(sys.argv[1])
wave = np.sin(np.arange(8000, dtype=np.float32) / 20)
inputs = processor([{"role": "user", "content": [{"type": "audio", "audio": wave}]}])
speech = model.generate_speech(**inputs, max_new_tokens=3, max_frames=3)
loaded = [name for name in ("deepspeed", "megatron_omni.engine", "megatron_omni.train") if sys.modules.get(name)]
print(len(speech.waves[0]) // 1920, loaded)
"""


def test_use_without_the_engine(exported) -> None:  # type: ignore[no-untyped-def]
    done = subprocess.run([sys.executable, "-c", WITHOUT_ENGINE, str(exported.folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    frames, loaded = done.stdout.split()[0], done.stdout.split(maxsplit=1)[1]
    assert 1 <= int(frames) <= 3
    assert loaded.strip() == "[]"
