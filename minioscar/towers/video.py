"""A video's file -> the frames that a model reads of it, by PyAV (the extra `video`): RGB and upright, in order.

Nothing is ever fetched, and a file that names other files (a playlist, a list of parts) is refused. The sound of a
video is not read.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, one_line, shown
from .pictures import MAX_PIXELS, from_data_url

FORMATS = "mov,matroska,webm,avi,gif,mpegts,mpeg,flv,ogg"  # FFmpeg's names; none of these opens another file
NAMES = "MP4, MOV, MKV, WebM, AVI, GIF, MPEG, FLV or OGG"
SOURCES = 'a file\'s name, its bytes, a data: URL, or {"frames": uint8 [n, height, width, 3], "fps": frames a second}'
LONG = 2000  # frames that are worth a word on stderr
Frames = Iterator[np.ndarray]


@dataclass(frozen=True)
class Video:
    """One that is open. total: frames that it has, `rate` of them a second. read: those of these numbers, which rise,
    each uint8 [height, width, 3]."""

    total: int
    rate: float
    height: int
    width: int
    read: Callable[[Sequence[int]], Frames]


@contextmanager
def opened(source: Any, name: str) -> Iterator[Video]:
    """name: of the video, for messages. Raises UserError for what is no video or is damaged, here or in `read`."""
    if isinstance(source, Mapping) and "frames" in source:
        yield _of_array(source["frames"], source.get("fps"), name)
        return
    try:
        import av
    except ImportError:
        raise UserError(f"{name} needs PyAV: pip install 'minioscar[video]'") from None
    with _file(source, name) as file:
        try:
            container = av.open(file, options={"format_whitelist": FORMATS})
        except (av.FFmpegError, OSError, ValueError) as error:
            raise UserError(f"{name} cannot be read as video ({_reason(error)}); give {NAMES}") from None
        with container:
            yield _of_container(container, name)


def _of_array(frames: Any, rate: Any, name: str) -> Video:
    is_rate = isinstance(rate, int | float) and not isinstance(rate, bool) and 0 < rate < 1e6
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        what = f"{frames.dtype} {list(frames.shape)}" if isinstance(frames, np.ndarray) else shown(frames)
        raise UserError(f"{name}: its frames are {what}; they must be an array uint8 [n, height, width, 3]")
    if not is_rate:
        raise UserError(f'{name}: "fps" {shown(rate)} must be how many of its frames are a second')
    if not frames.size:
        raise UserError(f"{name} has no frames; give at least one")
    return Video(len(frames), float(rate), *frames.shape[1:3], lambda indices: (frames[i] for i in indices))


@contextmanager
def _file(source: Any, name: str) -> Iterator[Any]:
    """An open file: FFmpeg is given no name, which could be an address or a protocol."""
    if isinstance(source, Mapping):  # {"url": ...}, as servers have it
        source = source.get("url")
    if isinstance(source, str) and source.startswith("data:"):
        source = from_data_url(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise UserError(f"{name} is on the network, from which nothing is fetched; save it and name the file")
    if isinstance(source, bytes | bytearray):
        yield io.BytesIO(source)
    elif isinstance(source, str | PathLike) and str(source) and "\0" not in str(source):
        if not Path(source).is_file():
            raise UserError(f"{name} is no file; give a video, such as an MP4")
        try:
            file = open(source, "rb")
        except OSError as error:
            raise UserError(f"{name} cannot be opened ({one_line(error)}); change who may read it") from None
        with file:
            yield file
    else:
        raise UserError(f"{name} {shown(source)} must be {SOURCES}")


def _of_container(container: Any, name: str) -> Video:
    import av

    covers = av.stream.Disposition.attached_pic  # of a sound
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not streams:
        raise UserError(f"{name} has no video stream; give {NAMES} with pictures in it")
    stream = streams[0]
    stream.thread_type = "AUTO"  # frames side by side, where the codec can
    total = _counted(container, stream, name)
    if not total:
        raise UserError(f"{name} has no frames; record it again")
    if not stream.average_rate:
        raise UserError(f"{name} does not say how many frames are a second; convert it")
    if stream.width * stream.height > MAX_PIXELS:
        what = f"{stream.width} x {stream.height} pixels, more than {MAX_PIXELS}"
        raise UserError(f"{name} has frames of {what}; make it smaller")
    height, width = next(_decoded(container, stream, name, [0])).shape[:2]
    if total > LONG:
        print(f"[{name}: looking through {total} frames]", file=sys.stderr, flush=True)

    def read(indices: Sequence[int]) -> Frames:
        return _decoded(container, stream, name, indices)

    return Video(total, float(stream.average_rate), height, width, read)


def _counted(container: Any, stream: Any, name: str) -> int:
    """How many frames the file shows: not every header says it, and one of a file that breaks off says too many."""
    import av

    try:
        hidden = [packet.is_discard for packet in container.demux(stream) if packet.size]  # cut off by an edit list
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{name} is damaged ({_reason(error)}); fetch or record it again") from None
    if len(hidden) < stream.frames:
        raise UserError(f"{name} breaks off after {len(hidden)} of {stream.frames} frames; fetch or record it again")
    return hidden.count(False)


def _decoded(container: Any, stream: Any, name: str, indices: Sequence[int]) -> Frames:
    """Frames of these numbers, which rise."""
    import av

    wanted, number = list(indices), -1
    try:
        container.seek(0)
        for number, frame in enumerate(container.decode(stream)):
            if not wanted:
                return
            if number == wanted[0] and frame.is_corrupt:
                raise UserError(f"{name} is damaged at frame {number}; fetch or record it again")
            if number == wanted[0]:
                picture = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
            while wanted and number == wanted[0]:  # of a video of few frames some are taken twice
                wanted.pop(0)
                yield np.ascontiguousarray(picture)
    except (av.FFmpegError, OSError) as error:
        why = f"{name} is damaged behind frame {max(number, 0)} ({_reason(error)})"
        raise UserError(f"{why}; fetch or record it again") from None
    if wanted:
        raise UserError(f"{name} breaks off after {number + 1} frames, before frame {wanted[0]}; record it again")


def _reason(error: Exception) -> str:
    """Without the number and the name of the buffer that PyAV adds."""
    return one_line(getattr(error, "strerror", None) or error)
