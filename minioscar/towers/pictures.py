"""A picture's file -> its pixels, by Pillow (the extra `vision`): RGB, turned as its EXIF says, its first frame.

Nothing is ever fetched. What is no picture, larger than Pillow's own limit, or broken off is refused in one line.
"""

from __future__ import annotations

import base64
import binascii
import io
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import numpy as np

from ..errors import UserError, one_line, shown
from ..storage.files import read_bytes

MAX_PIXELS = 178_956_970  # at which Pillow itself refuses: twice its MAX_IMAGE_PIXELS
FORMATS = "PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"  # none of which runs another program, as EPS does
logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it says of damaged files is in our one line
SOURCES = "a file's name, its bytes, a data: URL, a PIL image, or an array uint8 [height, width, 3]"


def opened(
    source: Any, name: str, check: Callable[[int, int], None] = lambda width, height: None, says: bool = True
) -> Any:
    """PIL.Image, RGB. name: of the picture, for messages. check: of width and height as its head has them, before its
    pixels are read. says: on stderr, that there are more frames. Raises UserError."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError(f"{name} needs Pillow: pip install 'minioscar[vision]'") from None
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise UserError(f"{name} is an array {source.dtype} {list(source.shape)}; it must be uint8 [h, w, 3]")
        source = Image.fromarray(source)
    if not isinstance(source, Image.Image):
        data = _bytes(source, name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a size that is checked below, and of odd metadata
                source = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError:
            raise UserError(f"{name} has more than {MAX_PIXELS} pixels; make it smaller") from None
        except Exception as error:  # Pillow's readers raise whatever comes to them
            why = f"is none of {', '.join(FORMATS)} ({_reason(error)}); convert it"
            raise UserError(f"{name} {why}") from None
    width, height = source.size
    if width * height > MAX_PIXELS:
        raise UserError(f"{name} has {width} x {height} pixels, more than {MAX_PIXELS}; make it smaller")
    check(width, height)
    return _rgb(source, name, says)


def _rgb(image: Any, name: str, says: bool) -> Any:
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            frames = getattr(image, "n_frames", 1)  # read from all of the file
            image.load()
            found = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:
        raise UserError(f"{name} is damaged ({_reason(error)}); fetch or convert it again") from None
    if frames > 1 and says:
        print(f"[{name} has {frames} frames; the first is read]", file=sys.stderr, flush=True)
    return found


def _reason(error: Exception) -> str:
    return one_line(error).partition(" <_io.")[0]  # Pillow names the buffer


def _bytes(source: Any, name: str) -> bytes:
    if isinstance(source, Mapping):  # {"url": ...} of OpenAI's API
        source = source.get("url")
    if isinstance(source, bytes | bytearray):
        return bytes(source)
    if isinstance(source, str) and source.startswith("data:"):
        return from_data_url(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise UserError(f"{name} is on the network, from which nothing is fetched; save it and name the file")
    if isinstance(source, str | PathLike) and str(source) and "\0" not in str(source):
        return read_bytes(str(source))
    raise UserError(f"{name} {shown(source)} must be {SOURCES}")


def from_data_url(url: str) -> bytes:
    """data:image/png;base64,... (RFC 2397). Raises UserError."""
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise UserError(f"{shown(url)} is not a data: URL in base64")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"the data: URL is not base64 ({one_line(error)})") from None
