"""Videos for Qwen3-VL and Qwen3-Omni: which frames are read, in what size, and how their time is told.

The tower is that of pictures: two frames in a row are a patch deep, and attention stays within such a pair, so that a
pair is encoded like a picture, by itself. What differs is how the model is told when a pair is:

Qwen3-VL    by text in front of each pair, "<0.3 seconds>"; a pair is a medium of its own, with positions of its own
Qwen3-Omni  by the positions alone: a video is one medium, whose pairs are so many positions apart as time passes

Qwen3VLVideoProcessor, Qwen2VLVideoProcessor and get_rope_index of transformers 5.24 are what its numbers are those of;
text stands in front of a pair as in transformers 4.57, where 5.24 leaves another pair of markers around all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ..backend import Backend
from ..errors import TooLarge, UserError, shown
from ..fields import Fields
from . import video
from .media import Features, Medium, check_tokens
from .qwen_vision import MAX_ASPECT, QwenVision, preprocessing

Array = Any
FILE = "video_preprocessor_config.json"
# What is meant where the file says nothing: of Qwen3-VL the pixels of all frames, as its published files have them; of
# Qwen3-Omni those of a frame, as its processor in transformers has them.
LIMITS = {True: (4096, 25_165_824), False: (128 << 10, 768 << 10)}


@dataclass(frozen=True)
class QwenVideo:
    """How videos are read, as video_preprocessor_config.json has it, and the tower of pictures, with their limits."""

    kind: ClassVar[str] = "video"
    token: int  # <|video_pad|>
    vision: QwenVision
    positions: int  # that the language model has
    rate: float  # frames a second
    positions_a_second: int | None = None  # None: the time is told in text
    min_frames: int = 4
    max_frames: int = 768

    @classmethod
    def of(
        cls, raw: Mapping[str, Any], said: Mapping[str, Any], source: str, vision: QwenVision, positions: int
    ) -> QwenVideo:
        """By config.json and video_preprocessor_config.json. Raises UserError for what is not implemented."""
        get, top = Fields(said, FILE, {"min_frames": 4, "max_frames": 768}), Fields(raw, source, {})
        for name, neutral in (("do_sample_frames", True), ("num_frames", None), ("cap_pixels_per_frame", False)):
            get.only(name, neutral, None)
        told = raw["model_type"] == "qwen3_vl"
        least, most = LIMITS[told]
        vision = replace(vision, min_pixels=least, max_pixels=most)
        vision = replace(vision, **preprocessing(said, vision, FILE))
        frames = get.count("min_frames"), get.count("max_frames")
        rate = get.positive("fps", 2.0 if told else 1.0)
        seconds = None if told else top.count("position_id_per_seconds", 25)
        made = cls(top.count("video_token_id", 151656), vision, positions, rate, seconds, *frames)
        made.step(rate, f"{FILE}: fps")
        return made

    @property
    def weights_of(self) -> str:
        return self.vision.kind

    @property
    def max_tokens(self) -> int:
        if self.positions_a_second is not None:  # a medium is a whole video
            return self.positions
        return min(self.positions, self.vision.max_tokens // self.vision.frames)

    @property
    def feature_width(self) -> int:
        return self.vision.feature_width

    def expected(self) -> dict[str, tuple[int, ...]]:
        """None: its weights are those of pictures."""
        return {}

    # --- frames

    def prepare(self, source: Any, name: str, most: int | None = None) -> list[Medium | str]:
        """What stands in the place of a video: its medium, or a medium for each pair of frames and its time in front.

        source: what `video.opened` takes, or {"video": that, "fps": frames a second to read of it}. Raises UserError,
        and TooLarge where a medium would have more than `most` tokens.
        """
        rate = self.rate
        if isinstance(source, Mapping) and "video" in source:
            source, rate = source["video"], self.rate if source.get("fps") is None else source["fps"]
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1000:
            raise UserError(f'{name}: "fps" {shown(rate)} must be how many frames of a second are read, such as 2')
        step = self.step(rate, f"{name}: fps")
        with video.opened(source, name) as given:
            indices = self.indices(given.total, given.rate, rate, name)
            height, width = self.resized(given.height, given.width, len(indices), name)
            indices += indices[-1:] * (-len(indices) % self.vision.frames)  # the last one again
            grid = self.grid(len(indices), height, width, step, name)
            tokens = math.prod(grid[0 if step else 1 :])
            check_tokens(f"{name} of {given.width} x {given.height} pixels", self.kind, tokens, most)
            frames = np.empty((len(indices), height, width, 3), np.uint8)
            for i, frame in enumerate(given.read(indices)):
                frames[i] = resize(frame, height, width)
            return self.media(frames, [i / given.rate for i in indices], grid, step, name)

    def media(
        self, frames: np.ndarray, seconds: Sequence[float], grid: tuple[int, int, int], step: int, name: str
    ) -> list[Medium | str]:
        """frames: uint8 [whole pairs, height, width, 3], in the size that the tower reads; seconds: of each."""
        if step:
            return [Medium.of(self.kind, frames, math.prod(grid), grid, name, step)]
        found, deep = [], self.vision.frames
        for i in range(0, len(frames), deep):
            pair, tokens = frames[i : i + deep], grid[1] * grid[2]
            found += [f"<{(seconds[i] + seconds[i + deep - 1]) / 2:.1f} seconds>"]
            found += [Medium.of(self.kind, pair, tokens, (1, *grid[1:]), name)]
        return found

    def indices(self, total: int, have: float, want: float, name: str) -> list[int]:
        """Which of `total` frames, `have` a second, are read to have `want` a second. Raises UserError."""
        if self.positions_a_second is None:  # evenly from the first to the last
            count = min(max(int(total / have * want), self.min_frames), self.max_frames, total)
            return np.linspace(0, total - 1, count).round().astype(int).tolist()
        deep, count = self.vision.frames, total / have * want
        if count > self.max_frames:
            why = f"{total / have:.0f} s long; at {want:g} a second these are {count:.0f} frames"
            way_out = f"at most {self.max_frames} are read: cut it, or give a smaller fps"
            raise TooLarge(f"{name} is {why}, and {way_out}", self.kind)
        count = math.floor(min(max(count, self.min_frames), total) / deep) * deep
        each = total / (count or total)  # of fewer frames than a pair all are read
        return (np.arange(total / each) * each).astype(np.float32).astype(int).tolist()

    def resized(self, height: int, width: int, frames: int, name: str) -> tuple[int, int]:
        """The size of whole tokens in which frames are read."""
        side = self.vision.patch * self.vision.merge
        if self.positions_a_second is None and min(height, width) < side:
            scale = max(side / height, side / width)
            height, width = int(height * scale), int(width * scale)
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise UserError(f"{name} of {width} x {height} pixels is more than {MAX_ASPECT} times as long as wide")
        if self.positions_a_second is not None:  # limits are a frame's
            return self.vision.resized(height, width)
        deep = self.vision.frames
        frames = max(frames, deep)
        return self.vision.resized(height, width, frames, round(frames / deep) * deep)

    def grid(self, frames: int, height: int, width: int, step: int, name: str) -> tuple[int, int, int]:
        """Time, rows and columns of its tokens. Raises UserError where they are more than the model has positions for,
        or fewer in a pair than the positions that pass from one to the next."""
        side = self.vision.patch * self.vision.merge
        grid = frames // self.vision.frames, height // side, width // side
        if (tokens := math.prod(grid)) > self.positions:
            what = f"{frames} frames of {width} x {height} pixels, {tokens} tokens"
            way_out = "cut it, or give a smaller fps"
            why = f"takes {what}, but this model has {self.positions} positions"
            raise TooLarge(f"{name} {why}; {way_out}", self.kind)
        if grid[1] * grid[2] < step:  # what follows would have positions beyond its place
            why = f"{grid[1] * grid[2]} tokens for two frames, fewer than the {step} positions of their time"
            raise UserError(f"{name} would have {why}; give a larger fps")
        return grid

    def step(self, rate: float, what: str) -> int:
        """Positions from one pair of frames to the next; 0 where time is text. Raises UserError where they are no whole
        number."""
        exact = self.vision.frames / rate * (self.positions_a_second or 0)
        if exact != int(exact):
            raise UserError(f"{what} {rate:g} would need positions between whole ones; give 0.5, 1 or 2")
        return int(exact)

    # --- the tower

    def encode(self, medium: Medium, weights: Mapping[str, Array], ops: Backend) -> Features:
        """As QwenVision.encode, a pair of frames after the other."""
        deep = self.vision.frames
        pairs = [medium.data[i : i + deep] for i in range(0, len(medium.data), deep)]
        found = [self.vision.encoded(pair, weights, ops) for pair in pairs]
        if len(found) == 1:
            return found[0]
        each = zip(*((of.embeddings, *of.deep) for of in found), strict=True)
        embeddings, *rest = (ops.xp.concatenate(arrays) for arrays in each)
        return Features(embeddings, rest)

    def work_bytes(self, tokens: int, ops: Backend) -> int:
        """Of a pair of the largest frames, and of the features of so many tokens, twice while they are joined."""
        largest = tokens
        if self.positions_a_second is not None:
            largest = min(tokens, self.vision.max_pixels // (self.vision.patch * self.vision.merge) ** 2)
        features = ops.dtype.itemsize * tokens * self.feature_width
        return self.vision.work_bytes(largest, ops, self.vision.frames) + (2 * features if largest < tokens else 0)


def resize(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3], by Pillow's bicubic filter."""
    from PIL import Image

    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
