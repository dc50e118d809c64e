"""Videos from a user's files to answers: containers and codecs, the command line, chats, caches, the server; what is
refused, and how. That the numbers are those of transformers is in test_video.py."""

from __future__ import annotations

import base64
import io
import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from tokenizers import Tokenizer as Library

from minioscar import engine as engines
from minioscar.app import cli
from minioscar.app.chat import command, summary
from minioscar.app.conversation import Conversation
from minioscar.config import Config
from minioscar.engine import Engine
from minioscar.errors import UserError
from minioscar.sampling import Sampling
from minioscar.serve import bodies
from minioscar.serve.errors import ApiError
from minioscar.serve.server import Plan, assemble
from minioscar.towers import video
from minioscar.towers.media import bytes_of_media, expanded, media_of

from .make_picture_fixtures import VISION
from .make_video_fixtures import OMNI, SAID, VL, clip
from .tiny import CONFIG, random_weights, write_talker

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}"
    "<|vision_start|><|{{ p.type }}_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = "the cat sat on the mat"
FPS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Qwen3-VL with random weights that can be talked to; as its videos are read, test_video.py has it."""
    folder = write_talker(tmp_path_factory.mktemp("vl") / "m", 5, TEMPLATE)
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.add_special_tokens(["<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"])
    library.save(str(folder / "tokenizer.json"))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [12, 10, 10], "mrope_interleaved": True}
    text = {**CONFIG, "head_dim": 64, "vocab_size": library.get_vocab_size(), "rope_parameters": rope}
    del text["rope_theta"], text["architectures"], text["model_type"]
    raw = {
        "model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"],
        "text_config": {**text, "num_hidden_layers": 3}, "vision_config": VISION, "tie_word_embeddings": False,
        **{f"{kind}_token_id": library.token_to_id(f"<|{kind}_pad|>") for kind in ("image", "video")},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    size = {"shortest_edge": 256, "longest_edge": 1 << 14}
    (folder / "preprocessor_config.json").write_text(json.dumps({"patch_size": 4, "size": size}))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(SAID[VL] | {"size": size}))
    save_file(random_weights(Config.from_folder(folder), 7), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Engine:
    return engines.load(folder, "int2", "cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Two films, the first again with another tenth frame, and a picture."""
    where, frames = tmp_path_factory.mktemp("films"), clip(11, 32, 48, np.random.default_rng(0))
    changed = frames.copy()
    changed[10] = 255 - changed[10]
    for name, of in {"a": frames, "b": clip(8, 24, 24, np.random.default_rng(1)), "changed": changed}.items():
        (where / f"{name}.mkv").write_bytes(film(of, "matroska", "ffv1", "bgr0"))
    Image.fromarray(frames[0]).save(where / "a.png")
    return {"picture": str(where / "a.png")} | {name: str(where / f"{name}.mkv") for name in ("a", "b", "changed")}


def film(frames: np.ndarray, kind: str = "mp4", codec: str = "libx264", pixels: str = "yuv420p", **how: str) -> bytes:
    """A file with these frames, FPS a second."""
    with tempfile.NamedTemporaryFile() as file:
        with av.open(file.name, "w", format=kind, options=how) as container:
            stream = container.add_stream(codec, rate=FPS)
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixels)))
            container.mux(stream.encode())
        return Path(file.name).read_bytes()


def tone() -> bytes:
    """A file of the same kind that holds sound alone."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def asked(*parts: str | dict) -> list[dict]:
    """One message: names of videos in order, then text."""
    *videos, text = parts
    return [{"role": "user", "content": [*({"type": "video", "video": one} for one in videos),
                                         {"type": "text", "text": text}]}]  # fmt: skip


def answer(model: Engine, messages, **how):
    return model.generate(messages, max_tokens=6, ignore_eos=True, **how)


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    code = cli.main([*map(str, argv), "--device", "cpu"])
    found = capsys.readouterr()
    return code, found.out, found.err


def data_url(file: str) -> str:
    return f"data:video/x-matroska;base64,{base64.b64encode(Path(file).read_bytes()).decode()}"


def read(source, indices: list[int] | None = None) -> tuple[video.Video, np.ndarray]:
    with video.opened(source, "a") as found:
        return found, np.stack(list(found.read(list(range(found.total)) if indices is None else indices)))


# --- files


@pytest.mark.parametrize(
    ("kind", "codec", "pixels"),
    [("mp4", "libx264", "yuv420p"), ("matroska", "ffv1", "bgr0"), ("avi", "mpeg4", "yuv420p"),
     ("webm", "libvpx-vp9", "yuv420p"), ("mpegts", "libx264", "yuv420p"), ("mov", "mjpeg", "yuvj420p")],
)  # fmt: skip
def test_frames_of_a_file_are_those_that_were_written(kind: str, codec: str, pixels: str, tmp_path, capfd) -> None:
    """By number, also those that other frames are made of; from a name, from bytes and from a data: URL."""
    frames = np.repeat(np.arange(0, 220, 10, np.uint8), 3 * 48 * 64).reshape(22, 48, 64, 3)
    data = film(frames, kind, codec, pixels)
    (tmp_path / "a").write_bytes(data)
    found, every = read(data)
    assert (found.total, found.rate, found.height, found.width) == (22, FPS, 48, 64)
    assert np.abs(every.astype(int) - frames).max() <= 6
    for source in (str(tmp_path / "a"), tmp_path / "a", f"data:video/mp4;base64,{base64.b64encode(data).decode()}"):
        assert np.array_equal(read(source, [0, 3, 4, 21, 21])[1], every[[0, 3, 4, 21, 21]])
    assert not capfd.readouterr().err


def test_a_film_of_a_turned_phone_is_upright() -> None:
    """The matrix of its header, 16.16 numbers, turns it a quarter clockwise."""
    frames = clip(3, 32, 48, np.random.default_rng(2))
    data = bytearray(film(frames))
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30)
    found, turned = read(bytes(data))
    assert (found.height, found.width) == (48, 32)
    assert np.array_equal(turned, np.rot90(read(film(frames))[1], -1, (1, 2)))


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def noise(frames: int = 30) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (frames, 64, 64, 3), np.uint8)


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "text": (lambda: b"this is no video\n" * 40, "cannot be read as video"),
    "empty": (lambda: b"", "cannot be read as video"),
    "picture": (lambda: picture_file(), "cannot be read as video"),
    "playlist": (lambda: b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n/etc/hosts\n#EXT-X-ENDLIST\n",
                 "cannot be read as video"),
    "list of files": (lambda: b"ffconcat version 1.0\nfile /etc/hosts\n", "cannot be read as video"),
    "sound": (tone, "has no video stream"),
    "no frames": (lambda: film(noise(3), movflags="frag_keyframe+empty_moov").partition(b"moof")[0][:-4],
                  "has no frames"),
    "broken off": (lambda: cut(film(noise(), movflags="faststart"), 0.6), "breaks off after .* of 30 frames"),
    "header lost": (lambda: cut(film(noise()), 0.6), "cannot be read as video"),
    "overwritten": (lambda: scrambled(film(noise(), "avi", "mjpeg", "yuvj420p")), "is damaged|breaks off"),
    "a line": (lambda: film(np.zeros((4, 2, 512, 3), np.uint8)), "more than 200 times as long as wide"),
}  # fmt: skip


def picture_file() -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(1)[0]).save(file, "PNG")
    return file.getvalue()


def scrambled(data: bytes) -> bytes:
    """With zeros over the middle half of every stored frame."""
    made, at = bytearray(data), data.find(b"00dc")
    while 0 <= at < data.rindex(b"idx1"):
        (size,) = struct.unpack("<I", data[at + 4 : at + 8])
        made[at + 8 + size // 4 : at + 8 + 3 * size // 4] = bytes(size // 2)
        made[at + 8 : at + 40] = bytes(32)
        at = data.find(b"00dc", at + 8)
    return bytes(made)


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_video_is_refused_in_one_line(folder, capfd, tmp_path, what) -> None:
    make, reason = BAD[what]
    (tmp_path / "a.mp4").write_bytes(make())
    with pytest.raises(UserError, match=reason):
        Config.from_folder(folder).video.prepare(str(tmp_path / "a.mp4"), "a.mp4")
    capfd.readouterr()
    code = cli.main(["generate", str(folder), WORDS, "--video", str(tmp_path / "a.mp4"), "--device", "cpu"])
    out, err = capfd.readouterr()
    assert (code, out) == (2, "") and err.count("\n") == 1 and "a.mp4" in err


def test_what_is_not_there_is_missed_before_the_model_is(capsys) -> None:
    code, _, err = run(capsys, "generate", "no-such-model", WORDS, "--video", "none.mp4")
    assert code == 2 and "none.mp4 is no file" in err and "no-such-model" not in err


def test_arrays_rates_and_addresses_are_checked(model) -> None:
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    for source, reason in (
        ({"frames": frames, "fps": 0}, '"fps" 0 must be how many'), ({"frames": frames}, '"fps" None must be'),
        ({"frames": frames[:, :, :, 0], "fps": 1}, r"uint8 \[4, 32, 32\]; they must be an array"),
        ({"frames": frames.astype(float), "fps": 1}, "float64"), ({"frames": frames[:0], "fps": 1}, "has no frames"),
        ({"frames": "a", "fps": 1}, "must be an array"), (3, "must be a file's name"),
        ("http://127.0.0.1/a.mp4", "on the network, from which nothing is fetched"), ({"url": None}, "must be a file"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=reason):
            answer(model, asked(source, WORDS))
    for fps in (0, -1, "2", True, float("nan")):
        part = {"type": "video", "video": {"frames": frames, "fps": 1}, "fps": fps}
        with pytest.raises(UserError, match='"fps" .* must be how many frames of a second are read'):
            answer(model, [{"role": "user", "content": [part]}])


def test_a_single_frame_is_read_twice_and_a_small_one_is_enlarged(model) -> None:
    tower, frame = model.config.video, np.full((1, 5, 7, 3), 90, np.uint8)
    text, medium = tower.prepare({"frames": frame, "fps": 3}, "a")
    assert text == "<0.0 seconds>" and medium.data.shape[0] == 2 and min(medium.data.shape[1:3]) >= 8
    assert np.array_equal(medium.data[0], medium.data[1])


def test_a_video_that_is_too_long_says_how_many_frames_it_takes(model, tmp_path) -> None:
    frames = np.zeros((9, 48, 48, 3), np.uint8)
    tower = model.config.video
    small = type(tower)(**{**{name: getattr(tower, name) for name in vars(tower)}, "positions": 20})
    with pytest.raises(UserError, match="a takes 10 frames of .* pixels, .* tokens, but this model has 20 positions"):
        small.prepare({"frames": frames, "fps": 2}, "a")
    omni = Config.from_folder(OMNI).video
    with pytest.raises(UserError, match="a is 9 s long; at 1 a second these are 9 frames, and at most 6 are read"):
        omni.prepare({"video": {"frames": frames, "fps": 1}, "fps": 1}, "a")
    for fps in (1.5, 3, 4):
        with pytest.raises(UserError, match=rf"a: fps {fps:g} would need positions between whole ones"):
            omni.prepare({"video": {"frames": frames, "fps": 3}, "fps": fps}, "a")
    with pytest.raises(UserError, match="16 tokens for two frames, fewer than the 26 positions of their time"):
        omni.prepare({"video": {"frames": frames[:4, :32, :32], "fps": 1}, "fps": 1}, "a")


def test_what_the_files_say_of_videos_and_is_not_implemented_is_refused(tmp_path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(VL / name, tmp_path / name)
    for said, reason in (
        ({"num_frames": 8}, "num_frames 8 is not supported"), ({"do_sample_frames": False}, "do_sample_frames"),
        ({"cap_pixels_per_frame": True}, "cap_pixels_per_frame"), ({"fps": 0}, "fps must be a positive number"),
        ({"patch_size": 14}, "patch_size 14"), ({"max_frames": 0}, "max_frames must be a positive whole number"),
    ):  # fmt: skip
        (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(SAID[VL] | said))
        with pytest.raises(UserError, match=f"video_preprocessor_config.json: {reason}"):
            Config.from_folder(tmp_path)
    (tmp_path / "video_preprocessor_config.json").unlink()
    made = Config.from_folder(tmp_path).video
    assert (made.rate, made.max_frames, made.vision.min_pixels, made.vision.max_pixels) == (2, 768, 4096, 25_165_824)


# --- the same answer by every way


def test_the_prompt_has_a_time_in_front_of_each_pair_and_the_frames_in_place_of_placeholders(model, files) -> None:
    """Eleven frames at five a second are four at two, and those are 0, 3, 7 and 10."""
    messages = model.opened(asked(files["a"], WORDS))
    first, second = (medium for medium in media_of(messages))
    every = read(files["a"])[1]
    assert np.abs(first.data.astype(int) - every[[0, 3]]).max() == 0 and np.array_equal(second.data, every[[7, 10]])
    marks = [model.tokenizer.special_id(f"<|vision_{end}|>") for end in ("start", "end")]
    want = [*model.tokenizer.encode("<|user|><0.3 seconds>"), marks[0], *first.ids, marks[1]]
    want += [*model.tokenizer.encode("<1.7 seconds>"), marks[0], *second.ids, marks[1]]
    want += model.tokenizer.encode(f"{WORDS}<|end|><|assistant|>")
    assert model.encode(messages) == want == model.encode(asked(files["a"], WORDS))


def test_the_command_line_python_and_jsonl_answer_alike(folder, model, files, capsys, tmp_path) -> None:
    picture = {"type": "image", "image": files["picture"]}
    messages = asked(files["a"], files["b"], WORDS)
    messages[0]["content"].insert(0, picture)
    want, common = answer(model, messages), ("--max-tokens", "6", "--ignore-eos", "--kv", "int2")
    flags = ["--video", files["a"], "--image", files["picture"], "--video", files["b"]]
    code, out, err = run(capsys, "generate", folder, WORDS, *flags, "--json", "--debug", *common)
    assert code == 0 and json.loads(out)["token_ids"] == want.token_ids, err
    parts = [picture, {"type": "video_url", "video_url": {"url": data_url(files["a"])}},
             {"type": "video", "video": files["b"], "fps": 2}, {"type": "text", "text": WORDS}]  # fmt: skip
    lines = [[{"role": "user", "content": parts}], asked("nothing", "a")]
    lines.append([{"role": "user", "content": [{**parts[2], "fps": 4}, *parts[3:]]}])
    (tmp_path / "lines").write_text("\n".join(json.dumps({"messages": of}) for of in lines))
    code, out, _ = run(capsys, "generate", folder, "--prompts-file", tmp_path / "lines", *common)
    first, second, third = map(json.loads, out.splitlines())
    assert code == 2 and first["token_ids"] == want.token_ids and "nothing is no file" in second["error"]
    slow = answer(model, asked(files["b"], WORDS))
    assert third["prompt_tokens"] > slow.prompt_tokens
    ids = [model.encode(asked(files[one], files[other], WORDS)) for one, other in ("ab", "ba", ("changed", "b"))]
    assert len(ids[0]) == len(ids[1]) == len(ids[2]) and ids[0] != ids[1] != ids[2] != ids[0]


def test_fps_is_what_the_command_line_says(folder, model, files, capsys) -> None:
    part = {"type": "video", "video": files["a"], "fps": 1.5}
    want = answer(model, [{"role": "user", "content": [part, {"type": "text", "text": WORDS}]}])
    common = "--max-tokens", "6", "--ignore-eos", "--kv", "int2", "--json"
    code, out, _ = run(capsys, "generate", folder, WORDS, "--video", files["a"], "--fps", "1.5", *common)
    assert code == 0 and json.loads(out)["token_ids"] == want.token_ids
    code, out, err = run(capsys, "generate", folder, WORDS, "--fps", "1.5", *common)
    assert (code, out) == (2, "") and "--fps is for --video" in err


def test_info_says_by_which_tower_videos_are_read(folder, capsys) -> None:
    code, out, _ = run(capsys, "info", folder)
    assert code == 0 and "videos: by the tower of images" in out


# --- no cache takes one video for another


def test_a_conversation_reads_a_video_once_and_goes_on_from_a_file(model, files, tmp_path, capsys) -> None:
    talk = Conversation(model, ctx=512)
    options = {"max_tokens": 2, "sampling": Sampling()}  # which are whole characters, with these weights
    tokens = sum(medium.tokens for medium in media_of(model.opened(asked(files["a"], WORDS))))
    assert command(talk, f"/video {files['a']}", options) and f"a.mkv: {tokens} tokens" in capsys.readouterr().err
    first = "".join(talk.say(WORDS, **options))
    assert first == model.generate(asked(files["a"], WORDS), **options).text
    talk.show(files["b"], "video")
    second = "".join(talk.say("the dog", **options))
    assert talk.last.prefilled_tokens < talk.last.prompt_tokens - tokens
    messages = [*asked(files["a"], WORDS), {"role": "assistant", "content": first}, *asked(files["b"], "the dog")]
    assert second == model.generate(messages, **options).text and json.dumps(summary(talk)) and not talk.shown
    talk.save(tmp_path / "c.safetensors")
    again = Conversation(model, cache=model.load_cache(tmp_path / "c.safetensors"), ctx=512)
    third = "".join(again.say("that cat", **options))
    assert again.last.prefilled_tokens < 30 and third == "".join(talk.say("that cat", **options))


def test_of_a_cached_video_what_is_before_a_changed_frame_is_used_and_no_more(model, files) -> None:
    held = model.prefill(asked(files["a"], WORDS))
    same = answer(model, asked(files["a"], WORDS + " and the dog"), cache=held)
    assert same.token_ids == answer(model, asked(files["a"], WORDS + " and the dog")).token_ids
    assert same.prefilled_tokens < 20
    with pytest.raises(UserError, match="do not begin with those of the prompt cache"):
        answer(model, asked(files["changed"], WORDS), cache=held)
    ids = [model.encode(asked(files[name], WORDS)) for name in ("a", "changed")]
    differ = next(i for i, (a, b) in enumerate(zip(*ids, strict=True)) if a != b)
    assert ids[0][differ] == media_of(model.opened(asked(files["a"], WORDS)))[1].ids[0]  # of the second pair


def test_places_without_videos_are_refused(model, files) -> None:
    with pytest.raises(UserError, match="the prompt has 3 places for 2 videos; leave the placeholder out"):
        answer(model, asked(files["a"], "<|video_pad|>"))
    with pytest.raises(UserError, match="1 places for 0 videos"):
        answer(model, [{"role": "user", "content": "<|video_pad|>"}])


def test_a_template_that_shows_videos_as_pictures_is_named_and_no_text_blamed(model, files) -> None:
    towers, pairs = model.config.towers, media_of(model.opened(asked(files["a"], WORDS)))
    with pytest.raises(UserError, match="the prompt has 0 places for 2 videos; the chat template shows fewer"):
        expanded([1, towers["image"].token, 2, towers["image"].token], pairs, towers)


# --- the server


def of_url(*urls: str, **more: float) -> dict:
    parts = [{"type": "video_url", "video_url": {"url": url}, **more} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": WORDS}]}], "max_tokens": 6}


def test_the_server_reads_data_urls_and_files_of_its_folder_and_opens_nothing_else(model, files, tmp_path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(files["a"], tmp_path / "in" / "a.mkv")
    (tmp_path / "in" / "link.mkv").symlink_to(files["b"])
    app, scheduler = assemble(model, Plan(1, 256, 128, None, "m", images=str(tmp_path / "in")), Sampling())
    inside = f"file://{tmp_path}/in"
    try:
        for url in (f"{inside}/a.mkv", data_url(files["a"])):
            [job] = bodies.chat(of_url(url), app.service).jobs
            assert job.ids == model.encode(asked(files["a"], WORDS))
        faster = bodies.chat(of_url(f"{inside}/a.mkv", fps=4), app.service).jobs[0]
        assert len(faster.ids) > len(job.ids)
        for url in ("http://127.0.0.1/a.mkv", f"file://{files['a']}", f"{inside}/link.mkv", files["a"],
                    f"{inside}/none.mkv", "data:video/mp4;base64,????", "data:video/mp4;base64,aaaa"):  # fmt: skip
            with pytest.raises(ApiError) as error:
                bodies.chat(of_url(url), app.service)
            assert error.value.status == 400 and "\n" not in str(error.value)
        with pytest.raises(ApiError, match='a video must be {"type": "video_url"'):
            bodies.chat({"messages": asked(files["a"], WORDS)}, app.service)
        app.service.towers = {"image": model.config.vision}
        with pytest.raises(ApiError, match="this model reads no videos"):
            bodies.chat(of_url(f"{inside}/a.mkv"), app.service)
    finally:
        scheduler.close()


def test_the_server_refuses_larger_frames_before_they_are_read_and_leaves_room_for_those_it_takes(model, files) -> None:
    """Two frames of the first film are 24 tokens."""
    app, scheduler = assemble(model, Plan(1, 256, 128, None, "m", media_tokens=24), Sampling())
    try:
        assert len(bodies.chat(of_url(data_url(files["a"])), app.service).jobs) == 1
        app.service.media_tokens = 23
        with pytest.raises(ApiError, match="the video of 48 x 32 pixels becomes 24 tokens, but at most 23") as error:
            bodies.chat(of_url(data_url(files["a"])), app.service)
        assert error.value.body["error"]["code"] == "video_too_large"
    finally:
        scheduler.close()
    tower, sizes = model.config.video, {}
    for most in (24, 4096):
        sizes[most] = bytes_of_media({"video": tower}, model.ops, most, 128)
    assert sizes[24] < sizes[4096] == bytes_of_media({"video": tower}, model.ops, tower.max_tokens, 128)
    medium = media_of(model.opened(asked(files["a"], WORDS)))[0]
    assert medium.tokens == 24 <= tower.max_tokens == (1 << 14) // 2 // 64
