"""eSpeak NG through ctypes: voices differ, clips are reproducible, unknown variants are refused."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_omni.demo.espeak import Speaker, Voice
from megatron_omni.demo.speak import ASSISTANT, DEV_VOICES, HELDOUT_VOICES, TRAIN_VOICES
from megatron_omni.runtime.errors import InputError

TEXT = "three five nine"


def test_every_voice_of_the_demo_speaks() -> None:
    speaker = Speaker()
    for voice in (*TRAIN_VOICES, *DEV_VOICES, *HELDOUT_VOICES, ASSISTANT):
        wave, rate = speaker.speak(TEXT, voice)
        assert rate == 22050
        assert wave.dtype == np.float32
        assert 0.5 < len(wave) / rate < 2.5
        assert 0.05 < np.abs(wave).max() <= 1


def test_fresh_speakers_say_the_same() -> None:
    voice = Voice("en-us", "m3")
    first, second = Speaker(), Speaker()
    for text in (TEXT, "anna has a red ball"):
        np.testing.assert_array_equal(first.speak(text, voice)[0], second.speak(text, voice)[0])


def test_the_assistant_says_the_same_whatever_came_before() -> None:
    speaker = Speaker()
    before = speaker.speak(TEXT, ASSISTANT)[0]
    speaker.speak("something else", Voice("en", "f2"))
    np.testing.assert_array_equal(speaker.speak(TEXT, ASSISTANT)[0], before)


def test_rate_and_pitch_are_obeyed() -> None:
    speaker = Speaker()
    slow, fast = (len(speaker.speak(TEXT, Voice("en-us", "m3", rate=rate))[0]) for rate in (140, 200))
    assert slow > 1.2 * fast
    low, high = (speaker.speak(TEXT, Voice("en-us", "Denis", pitch=pitch))[0] for pitch in (20, 80))
    assert np.any(low[: min(len(low), len(high))] != high[: min(len(low), len(high))])


def test_unknown_voices_are_refused() -> None:
    speaker = Speaker()
    with pytest.raises(InputError, match="nosuch"):
        speaker.speak(TEXT, Voice("en-us", "nosuch"))
    with pytest.raises(InputError, match="xx-yy"):
        speaker.speak(TEXT, Voice("xx-yy", "m1"))
