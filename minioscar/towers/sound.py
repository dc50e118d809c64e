"""A sound file -> samples -> log-mel frames, as Whisper's feature extractor makes them (Qwen3-Omni takes the same).

Sound is one channel of float32 samples at 16 kHz here, about -1 ... 1.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TooLarge, UserError, one_line, shown

RATE = 16000  # samples a second
WINDOW, HOP = 400, 160  # samples of a frame of the spectrum, and from one to the next
BLOCK = 512  # frames whose spectrum is in memory at once
SOURCES = "a file's name, its bytes, or an array float32 [samples] at 16 kHz"


def opened(source: Any, name: str, max_seconds: float, holder: str = "this model's context") -> np.ndarray:
    """The samples of a sound, float32 [samples] at 16 kHz. name: of it, holder: what has room for max_seconds, for
    messages.

    Files and bytes are of any format of libsndfile (WAV, FLAC, OGG, MP3), bytes also in base64. Channels are averaged,
    then the rate is changed by soxr at its high quality, as librosa does both. Raises UserError for what is no sound,
    is shorter than a frame or, already by a file's header, longer than max_seconds (TooLarge).
    """

    def check(seconds: float) -> None:
        if seconds > max_seconds:
            why = f"{seconds:.0f} s long, but {holder} holds {max_seconds:.0f} s"
            raise TooLarge(f"{name} is {why}; shorten it", "audio")

    if isinstance(source, Mapping):
        source = _decoded(source.get("data"), name)
    if isinstance(source, np.ndarray):
        if source.dtype != np.float32 or source.ndim != 1:
            raise UserError(f"{name} is an array {source.dtype} {list(source.shape)}; it must be {SOURCES}")
        check(len(source) / RATE)
        samples = source
    elif isinstance(source, bytes | bytearray):
        samples = _read(Buffer(source), name, check)
    elif isinstance(source, str | PathLike) and str(source) and "\0" not in str(source):
        if not Path(source).is_file():
            raise UserError(f"{name} is no file; give a sound file, such as a WAV")
        samples = _read(source, name, check)
    else:
        raise UserError(f"{name} {shown(source)} must be {SOURCES}")
    if not np.isfinite(samples).all():
        raise UserError(f"{name} has samples that are no numbers; it is damaged: make it again")
    if len(samples) < WINDOW:
        raise UserError(f"{name} is {len(samples) / RATE * 1000:.0f} ms long; at least 25 ms are needed")
    return samples


class Buffer(io.BytesIO):
    """A seek to before the beginning, which damaged files make libsndfile ask for, ends there: an error in its callback
    would be a traceback on stderr."""

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            return super().seek(0)


def _decoded(data: Any, name: str) -> bytes:
    """Of {"data": base64, "format": "wav"}, OpenAI's input_audio."""
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise UserError(f"{name}: its data is not base64 ({one_line(error)})") from None


def _read(file: Any, name: str, check: Callable[[float], None]) -> np.ndarray:
    try:
        import soundfile
        import soxr
    except ImportError:
        raise UserError(f"{name} needs soundfile and soxr: pip install 'minioscar[audio]'") from None
    try:
        with soundfile.SoundFile(file) as opened_file:
            rate, frames = opened_file.samplerate, opened_file.frames
            check(frames / rate)
            blocks = opened_file.blocks(1 << 20, dtype="float32", always_2d=True)  # [frames, channels]
            samples = np.concatenate([np.zeros(0, np.float32), *(block.mean(axis=1) for block in blocks)])
    except (soundfile.SoundFileError, OSError) as error:
        raise UserError(f"{name} cannot be read as sound ({_reason(error)}); give a WAV, FLAC, OGG or MP3") from None
    return samples if rate == RATE or not len(samples) else soxr.resample(samples, rate, RATE, "HQ")


def _reason(error: Exception) -> str:
    return one_line(error).rpartition(">: ")[2]  # soundfile names the buffer


def log_mel(samples: np.ndarray, bins: int) -> np.ndarray:
    """Logarithms of the power in `bins` mel bands, 100 frames a second: samples [n] -> float32 [n // 160, bins].

    Frames are centred, the ends mirrored, with a Hann window; what is 8 decades below the loudest is cut off, and all
    is brought to about -1 ... 1. WhisperFeatureExtractor of transformers 5.24. Raises ValueError below 201 samples.
    """
    if len(samples) <= WINDOW // 2:
        raise ValueError(f"{len(samples)} samples are too few to mirror {WINDOW // 2} of them")
    padded = np.pad(samples.astype(np.float64), WINDOW // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][: len(samples) // HOP]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)  # periodic
    filters, mel = mel_filters(bins), np.empty((len(frames), bins))
    for i in range(0, len(frames), BLOCK):
        spectrum = np.fft.rfft(frames[i : i + BLOCK] * hann)
        mel[i : i + BLOCK] = (spectrum.real**2 + spectrum.imag**2) @ filters
    mel = np.log10(np.maximum(mel, 1e-10))
    return ((np.maximum(mel, mel.max() - 8) + 4) / 4).astype(np.float32)


def work_bytes(frames: int, bins: int) -> int:
    """Of the arrays of `log_mel`, on the host: samples mirrored, a block's frames and spectra, and mel bands."""
    block = 8 * (2 * WINDOW + 5 * (WINDOW // 2 + 1))
    return 16 * (HOP * frames + WINDOW) + block * min(frames, BLOCK) + 32 * bins * frames


def mel_filters(bins: int) -> np.ndarray:
    """Triangles of equal area over the frequencies of a spectrum, evenly on Slaney's mel scale from 0 to 8 kHz; float64
    [201, bins]. Slaney, Auditory Toolbox (1998): linear to 1 kHz, 27 steps for a factor of 6.4 above."""

    def hertz(mel: Any) -> Any:
        return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))

    highest = 15 + 27 * np.log(RATE / 2 / 1000) / np.log(6.4)
    corners = hertz(np.linspace(0, highest, bins + 2))
    frequencies = np.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    left, middle, right = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (frequencies - left) / (middle - left), (right - frequencies) / (right - middle)
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (right - left)
