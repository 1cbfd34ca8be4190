"""eSpeak NG through ctypes: text to a waveform in a few milliseconds, with the library that ``pip`` installed (``espeakng-loader``)."""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import espeakng_loader
import numpy as np

from megatron_omni.runtime.errors import InputError, WorkError

# speak_lib.h
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_CHARS_UTF8 = 1
_RATE, _PITCH, _RANGE = 1, 3, 4
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class Voice:
    """A way to speak: ``accent+variant`` in eSpeak's terms, at one speed and pitch."""

    accent: str
    """Language of eSpeak, such as ``en-us`` or ``en-gb-scotland``."""
    variant: str
    """File in its ``voices/!v``."""
    rate: int = 165
    """Words a minute."""
    pitch: int = 50
    """0..99, where 50 is the variant's own."""
    melody: int = 50
    """Range of the intonation, 0 (one note)..99."""

    @property
    def name(self) -> str:
        return f"{self.accent}-{self.variant}-{self.rate}-{self.pitch}".lower()


class Speaker:
    """A private copy of the library: what it says depends on what it said before, and on nothing else in the process.

    eSpeak keeps its slow pitch wobble ("flutter") running from one utterance to the next in static variables, and seeds it
    with the time of day, so that in a shared copy a clip would depend on who spoke last. Without flutter, and on one note,
    a clip depends on its text alone.
    """

    def __init__(self) -> None:
        library = Path(espeakng_loader.get_library_path())
        self._data = Path(espeakng_loader.get_data_path())
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copy(library, Path(folder) / f"private-{library.name}")
            self._library = ctypes.CDLL(str(copy))
        self.rate: int = self._library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, str(self._data.parent).encode(), 0)
        """Hz."""
        if self.rate <= 0:
            raise WorkError(f"eSpeak NG did not start with its data in {self._data}; install espeakng-loader again")
        self._libc = ctypes.CDLL(None)
        self._chunks: list[np.ndarray] = []
        self._callback = _CALLBACK(self._receive)  # kept, or it would be collected while the library still calls it
        self._library.espeak_SetSynthCallback(self._callback)

    def speak(self, text: str, voice: Voice) -> tuple[np.ndarray, int]:
        """float32 [W] in [-1, 1), and its rate in Hz.

        Raises:
            InputError: The voice or its variant does not exist (eSpeak itself would fall back in silence), or nothing was said.
        """
        if not (self._data / "voices" / "!v" / voice.variant).is_file():
            raise InputError(f"eSpeak has no voice variant {voice.variant!r}; the files in {self._data / 'voices' / '!v'} are the choice")
        if self._library.espeak_SetVoiceByName(f"{voice.accent}+{voice.variant}".encode()) != 0:
            raise InputError(f"eSpeak has no language {voice.accent!r}; try en-us, en-gb-scotland, en-029, ...")
        for parameter, value in ((_RATE, voice.rate), (_PITCH, voice.pitch), (_RANGE, voice.melody)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # of the wobble
        self._libc.srand(1)  # of the noise in consonants
        self._chunks.clear()
        encoded = text.encode() + b"\0"
        status = self._library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded)), 0, 0, 0, _CHARS_UTF8, None, None)
        if status != 0 or not self._chunks:
            raise InputError(f"eSpeak said nothing for {text!r} (status {status}); give it words")
        return np.concatenate(self._chunks).astype(np.float32) / 32768.0, self.rate

    def _receive(self, samples: ctypes._Pointer[ctypes.c_short], count: int, _events: int) -> int:
        """Called by the library with each piece of sound; 0 means go on."""
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0
