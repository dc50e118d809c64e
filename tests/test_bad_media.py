"""Pictures and sounds that are no good, too large or unusual, by each way that one can come: the command line, Python
and the server. What is refused is refused in one line and nothing of it is left; what is read is read alike."""

from __future__ import annotations

import base64
import io
import json
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from minioscar import engine as engines
from minioscar import memory
from minioscar.app import cli
from minioscar.cache import cache_bytes
from minioscar.engine import Engine
from minioscar.errors import UserError
from minioscar.sampling import Sampling
from minioscar.serve import server
from minioscar.serve.pooled import kept_sinks
from minioscar.serve.server import Plan
from minioscar.towers import sound
from minioscar.towers.media import bytes_of_media, media_of, placed

from . import test_llava_and_omni as omni
from . import test_picture_prompts as vl
from .asgi import Client

MOST = 200  # tokens of a picture or a sound at the server
seeing = vl.folder  # a fixture: the folder of a Qwen3-VL with random weights, at most 256 tokens a picture
data_of = vl.saved  # a picture's bytes


@contextmanager
def serving(engine: Engine, **plan: Any) -> Iterator[Client]:
    given = {"slots": 1, "ctx": 512, "chunk": 128, "queue": None, "name": "m", "media_tokens": MOST} | plan
    app, scheduler = server.assemble(engine, Plan(**given), Sampling())
    scheduler.start()
    try:
        yield Client(app)
    finally:
        scheduler.close()


@dataclass
class Ways:
    """A model and the ways to ask it about files of one kind."""

    kind: str
    prompt: str
    folder: Path
    engine: Engine
    client: Client
    capsys: pytest.CaptureFixture[str]

    def by_command(self, *files: str) -> tuple[int, str, str]:
        flags = [flag for file in files for flag in (f"--{self.kind}", file)]
        self.capsys.readouterr()
        options = "--device", "cpu", "--kv", "bf16", "--max-tokens", "3", "--json"
        code = cli.main(["generate", str(self.folder), self.prompt, *flags, *options])
        found = self.capsys.readouterr()
        return code, found.out, found.err

    def by_python(self, *sources: Any) -> list[int]:
        parts = [{"type": self.kind, self.kind: source} for source in sources]
        content = [*parts, {"type": "text", "text": self.prompt}]
        return self.engine.generate([{"role": "user", "content": content}], max_tokens=3).token_ids

    def by_server(self, *sources: bytes) -> tuple[int, dict[str, Any]]:
        data = [base64.b64encode(source).decode() for source in sources]
        if self.kind == "image":
            parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{one}"}} for one in data]
        else:
            parts = [{"type": "input_audio", "input_audio": {"data": one, "format": "wav"}} for one in data]
        content = [*parts, {"type": "text", "text": self.prompt}]
        asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 3, "temperature": 0}
        answer = self.client.post("/v1/chat/completions", asked)
        return answer.status, answer.json()

    def files(self, sources: tuple[bytes, ...], where: Path) -> list[str]:
        ending = {"image": "png", "audio": "wav"}[self.kind]
        for i, source in enumerate(sources):
            (where / f"{i}.{ending}").write_bytes(source)
        return [str(where / f"{i}.{ending}") for i in range(len(sources))]

    def refuse(self, where: Path, reason: str, *sources: bytes, code: str | None = None) -> None:
        """By each of them, in one line; the server for this reason or one that it has a code for."""
        files = self.files(sources, where)
        status, out, err = self.by_command(*files)
        assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("minioscar: "), err
        for given in (sources, files):
            with pytest.raises(UserError, match=reason) as found:
                self.by_python(*given)
            assert "\n" not in str(found.value)
        status, body = self.by_server(*sources)
        message = body["error"].pop("message")
        assert (status, body["error"]) == (400, {"type": "invalid_request_error", "param": "messages", "code": code})
        assert "\n" not in message and (code or pytest.raises(UserError, match=reason).matches(UserError(message)))

    def read(self, where: Path, source: bytes) -> list[int]:
        """By each of them, to the same answer: its ids."""
        [file] = self.files((source,), where)
        code, out, err = self.by_command(file)
        assert code == 0, err
        ids = json.loads(out)["token_ids"]
        assert self.by_python(source) == self.by_python(file) == ids
        status, body = self.by_server(source)
        assert status == 200 and body["choices"][0]["message"]["content"] == self.engine.tokenizer.decode(ids)
        return ids


@pytest.fixture
def seen(seeing: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Ways]:
    engine = engines.load(seeing, "bf16", "cpu")
    with serving(engine) as client:
        yield Ways("image", vl.WORDS, seeing, engine, client, capsys)


@pytest.fixture
def heard(tmp_path_factory, capsys: pytest.CaptureFixture[str]) -> Iterator[Ways]:
    folder = omni.folder(tmp_path_factory.mktemp("omni"), "qwen3-omni")
    engine = engines.load(folder, "bf16", "cpu")
    with serving(engine) as client:
        yield Ways("audio", "t05 t06", folder, engine, client, capsys)


# --- what is refused


def test_what_is_no_picture_is_refused_by_each_way_and_the_next_one_is_read(seen: Ways, tmp_path: Path) -> None:
    frames = data_of(vl.png((64, 48)), "GIF", save_all=True, append_images=[vl.png((64, 48)).rotate(90)])
    bad = {name: (make(), reason) for name, (make, reason) in vl.BAD.items()}
    bad["a frame that breaks off"] = frames[: len(frames) // 4], "is damaged"
    for i in (8, 14, 40, 100):
        bad[f"a GIF of {i} bytes"] = frames[:i], "is none of|is damaged"
    tiff = bytearray(data_of(vl.png((64, 48)), "TIFF", save_all=True, append_images=[vl.png((64, 48))]))
    tiff[next(at for kind in (b"\3\0", b"\4\0") if (at := tiff.find(b"\x11\x01" + kind)) >= 0) + 2] = 2
    bad["a TIFF whose offsets are text"] = bytes(tiff), "is damaged"
    for source, reason in bad.values():
        seen.refuse(tmp_path, reason, source)
    assert seen.read(tmp_path, data_of(vl.png((64, 48)), "PNG"))
    assert seen.client.get("/health").status == 200


def test_more_pictures_than_the_template_shows_are_refused_by_each_way(
    seeing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A template that shows only the first picture of a message."""
    folder = tmp_path / "m"
    folder.mkdir()
    for file in seeing.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    once = vl.TEMPLATE.replace("p.type == 'image'", "p.type == 'image' and not loop.first")
    assert settings["chat_template"] == vl.TEMPLATE != once
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": once}))
    engine, picture = engines.load(folder, "bf16", "cpu"), data_of(vl.png((64, 48)), "PNG")
    with serving(engine) as client:
        ways = Ways("image", vl.WORDS, folder, engine, client, capsys)
        ways.refuse(tmp_path, "the prompt has 1 places for 2 images; the chat template shows fewer", picture, picture)


def test_what_is_no_sound_and_an_hour_are_refused_by_each_way_and_the_next_one_is_read(
    heard: Ways, tmp_path: Path
) -> None:
    for source, reason in ((b"no sound at all\n" * 99, "cannot be read as sound"), (b"", "cannot be read as sound"),
                           (wav(np.zeros(300)), "19 ms long")):  # fmt: skip
        heard.refuse(tmp_path, reason, source)
    hour = wav(np.zeros(3600 * 100), rate=100)
    heard.refuse(tmp_path, "3600 s long, but this model's context holds", hour, code="audio_too_large")
    assert heard.read(tmp_path, wav(omni.sound(0.5)))


@pytest.mark.parametrize("case", ["qwen3_vl", "llava"])
def test_pictures_without_pillow_name_the_extra(seeing: Path, monkeypatch, case: str) -> None:
    tower = (engines.Config.from_folder(seeing) if case == "qwen3_vl" else omni.engine(case).config).vision
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match="a.png needs Pillow: pip install 'minioscar\\[vision\\]'"):
        tower.prepare("a.png", "a.png")


# --- what is read


def test_turns_colours_alpha_and_frames_are_the_same_picture_by_each_way(seen: Ways, tmp_path: Path) -> None:
    picture = vl.png((64, 48))
    plain, exif = data_of(picture, "PNG"), Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees to the right
    want = seen.read(tmp_path, plain)
    turned = data_of(picture.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    alpha = picture.copy()
    alpha.putalpha(Image.effect_noise(picture.size, 90))
    frames = data_of(picture, "PNG", save_all=True, append_images=[picture.rotate(90)])
    for source in (turned, data_of(alpha, "PNG"), frames):
        assert seen.read(tmp_path, source) == want
    [file] = seen.files((frames,), tmp_path)
    assert f"[{file} has 2 frames; the first is read]\n" in seen.by_command(file)[2]
    cmyk = data_of(picture.convert("CMYK"), "TIFF")
    assert seen.read(tmp_path, cmyk) == seen.by_python(picture.convert("CMYK").convert("RGB"))


def test_silence_another_rate_and_six_channels_are_the_same_sound_by_each_way(heard: Ways, tmp_path: Path) -> None:
    assert heard.read(tmp_path, wav(np.zeros(8000)))
    samples = omni.sound(0.5)
    want = heard.read(tmp_path, wav(samples))
    assert heard.read(tmp_path, wav(np.repeat(samples[:, None], 6, axis=1))) == want
    slow = wav(np.sin(np.arange(4000) / 9) / 2, rate=8000)
    assert heard.engine.opened([{"role": "user", "content": [{"type": "audio", "audio": slow}]}])
    assert heard.read(tmp_path, slow)


@pytest.mark.filterwarnings("error")  # as which pytest has what a callback raises
def test_a_damaged_sound_leaves_no_traceback_of_its_library(capfd: pytest.CaptureFixture[str], seed) -> None:
    """Heads that are cut and changed: each is read, or refused in one line, and nothing is written to stderr."""
    rng, whole = np.random.default_rng(seed), [wav(omni.sound(0.5)), aiff(omni.sound(0.5))]
    for i in range(300):
        data = bytearray(whole[i % 2][: rng.integers(len(whole[0])) if i % 3 else None])
        for at in rng.integers(0, max(min(len(data), 100), 1), rng.integers(6)):
            data[at : at + 1] = bytes([rng.integers(256)])
        try:
            sound.opened(bytes(data), "a", 100)
        except UserError as error:
            assert "\n" not in str(error)
    assert capfd.readouterr().err == ""


def aiff(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16000, format="AIFF")
    return buffer.getvalue()


def wav(samples: np.ndarray, rate: int = 16000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.astype(np.float32), rate, format="WAV", subtype="FLOAT" if rate > 100 else "PCM_16")
    return buffer.getvalue()


# --- the server's room for them


def test_the_server_reads_a_picture_of_its_limit_and_refuses_a_larger_one_by_its_head(seen: Ways) -> None:
    """The larger one breaks off behind its head: its pixels are not looked at."""
    limit, larger = (data_of(vl.png(size), "PNG") for size in ((8 * 20, 8 * 10), (8 * 67, 8 * 3)))
    assert seen.by_server(limit)[0] == 200
    status, body = seen.by_server(larger[:200])
    message = "the image of 536 x 24 pixels becomes 201 tokens, but at most 200 are accepted; make it smaller"
    wanted = {"message": message, "type": "invalid_request_error", "param": "messages", "code": "image_too_large"}
    assert (status, body) == (400, {"error": wanted})
    assert "damaged" in seen.by_server(limit[:200])[1]["error"]["message"]


def test_the_server_refuses_a_longer_sound_by_its_head(heard: Ways) -> None:
    status, body = heard.by_server(wav(np.zeros(16 * 100), rate=100))
    message = "the audio is 16 s long, but a sound of 200 tokens holds 15 s; shorten it"
    wanted = {"message": message, "type": "invalid_request_error", "param": "messages", "code": "audio_too_large"}
    assert (status, body) == (400, {"error": wanted})
    assert heard.by_server(wav(np.zeros(15 * 100), rate=100))[0] == 200


@pytest.mark.parametrize("parts", [1, 3])
def test_a_cached_beginning_that_ends_within_a_picture_is_gone_on_with(seeing: Path, parts: int) -> None:
    """Its last whole block ends there: what follows is read again from the middle of the picture, and answered alike.
    The same after another question to the same picture, and never after another picture."""
    engine = engines.load(seeing, "int2", "cpu")
    pictures = [data_of(vl.png(size), "PNG") for size in ((160, 80), (72, 72), (80, 80))[:parts]]
    other = bytearray(np.asarray(vl.png((160, 80))).tobytes())
    other[-1] ^= 1  # of the last pixel, one step of blue
    changed = data_of(Image.frombytes("RGB", (160, 80), bytes(other)), "PNG")
    with serving(engine, ctx=1024) as client:

        def ask(pictures: list[bytes], question: str) -> tuple[str, int]:
            status, body = Ways("image", question, seeing, engine, client, None).by_server(*pictures)
            assert status == 200
            cached = body["usage"]["prompt_tokens_details"]["cached_tokens"]
            return body["choices"][0]["message"]["content"], cached

        first, none = ask(pictures, vl.WORDS)
        assert none == 0
        ask([], "the dog " * 40)  # takes the only slot
        again, cached = ask(pictures, vl.WORDS)
        assert again == first and cached % 128 == 0 and 0 < cached < 200 * parts
        assert ask([changed, *pictures[1:]], vl.WORDS)[1] == 0
        ask([], "the dog " * 40)
        assert ask(pictures, "a cat and the dog")[1] >= 128


def test_features_and_the_largest_picture_in_its_tower_fit_what_is_left_for_them(seen: Ways, monkeypatch) -> None:
    """A pass that ends one picture, reads others and begins another, while features of earlier ones are kept."""
    kept, chunk, model = 400_000, 320, seen.engine.model
    monkeypatch.setattr("minioscar.towers.media.KEPT_BYTES", kept)
    rng = np.random.default_rng(3)
    messages = [{"role": "user", "content": [
        {"type": "image", "image": rng.integers(0, 256, (80, 160, 3), np.uint8)} for _ in range(12)
    ]}]  # fmt: skip
    media = media_of(seen.engine.opened(messages))
    ids = [i for medium in media for i in medium.ids]
    assert {medium.tokens for medium in media} == {MOST} and len(ids) == 12 * MOST
    for medium in media[:4]:
        model.encoder._features(medium)
    inputs = placed([ids], [5 * MOST - 20], [chunk], media)
    held = sum(features.nbytes for features in model.encoder.kept.values())
    tracemalloc.start()
    found = model.encoder.of(inputs)
    peak = tracemalloc.get_traced_memory()[1] + held
    tracemalloc.stop()
    left = bytes_of_media(seen.engine.config.towers, seen.engine.ops, MOST, chunk)
    assert len(found) == 3 and peak - 200_000 <= left <= 2 * peak, (peak, left)


def test_start_up_leaves_what_the_largest_picture_takes_out_of_the_pool(seeing: Path, monkeypatch) -> None:
    engine = engines.load(seeing, "int2", "cpu")
    config, ops, longest = engine.config, engine.ops, engine.config.max_context
    text = replace(config, vision=None, video=None)
    assert text.towers == {} and bytes_of_media(text.towers, ops, 4096, 128) == 0
    sizes = [bytes_of_media(config.towers, ops, most, 128) for most in (8, 64, 256, 4096)]
    assert 0 < sizes[0] < sizes[1] < sizes[2] == sizes[3]  # no picture, and no two frames, are more
    none, one = (cache_bytes(config, engine.scheme, 64, longest, n, kept_sinks(64)) for n in range(2))
    free = none + ops.work_bytes(config, 128, longest, 64, None) + sizes[-1] + 20 * (one - none)
    monkeypatch.setattr(ops, "free_bytes", lambda: free)
    plans = [Plan(64, longest, 128, None, "m", media_tokens=most) for most in (8, 64, 256, 4096)]
    blocks = [server.most_blocks(engine, plan, longest) for plan in plans]
    assert blocks == [20 + (sizes[-1] - size) // (one - none) for size in sizes] and blocks[0] > blocks[1] > 20


def test_a_cache_that_leaves_no_room_for_pictures_is_refused_at_the_start(seeing: Path, monkeypatch) -> None:
    engine = engines.load(seeing, "bf16", "cpu")
    need = memory.needed(engine.config, engine.scheme, engine.ops, 2, 512, 128, penalties=None).total
    left, plan = bytes_of_media(engine.config.towers, engine.ops, 256, 128), Plan(2, 512, 128, None, "m")
    monkeypatch.setattr(engine.ops, "free_bytes", lambda: need + left)
    server.assemble(engine, plan, Sampling())[1].close()
    monkeypatch.setattr(engine.ops, "free_bytes", lambda: need + left - 1)
    with pytest.raises(UserError, match="images and videos of 512 tokens need .*; a smaller --media") as found:
        server.assemble(engine, plan, Sampling())
    assert "\n" not in str(found.value)
    with pytest.raises(UserError, match="--media-tokens 0 is out of range"):
        replace(plan, media_tokens=0).check()
