"""Pictures from a user's files to answers: the command line, chats, caches, the server; what is refused, and how."""

from __future__ import annotations

import base64
import io
import json
import queue
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer as Library

from minioscar import engine as engines
from minioscar.answers import Generation
from minioscar.app import cli
from minioscar.app.chat import command, summary
from minioscar.app.conversation import Conversation
from minioscar.app.prompts import with_media
from minioscar.config import Config
from minioscar.engine import Engine
from minioscar.errors import UserError
from minioscar.sampling import Sampling
from minioscar.serve import bodies, prefixes
from minioscar.serve.errors import ApiError
from minioscar.serve.jobs import Event
from minioscar.serve.server import Plan, assemble
from minioscar.towers import pictures
from minioscar.towers.media import expanded, media_of

from .make_picture_fixtures import VISION
from .patience import PATIENCE
from .tiny import CONFIG, random_weights, write_talker

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = "the cat sat on the mat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Qwen3-VL with random weights that can be talked to."""
    folder = write_talker(tmp_path_factory.mktemp("vl") / "m", 5, TEMPLATE)
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.add_special_tokens(["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"])
    library.save(str(folder / "tokenizer.json"))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [12, 10, 10], "mrope_interleaved": True}
    text = {**CONFIG, "head_dim": 64, "vocab_size": library.get_vocab_size(), "rope_parameters": rope}
    del text["rope_theta"], text["architectures"], text["model_type"]
    raw = {
        "model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"],
        "text_config": {**text, "num_hidden_layers": 3}, "vision_config": VISION,
        "image_token_id": library.token_to_id("<|image_pad|>"), "tie_word_embeddings": False,
    }  # fmt: skip
    size = {"shortest_edge": 256, "longest_edge": 1 << 14}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "preprocessor_config.json").write_text(json.dumps({"patch_size": 4, "size": size}))
    size = {"shortest_edge": 256, "longest_edge": 2 << 14}  # of all frames of a video, of which two are a token deep
    (folder / "video_preprocessor_config.json").write_text(json.dumps({"patch_size": 4, "size": size}))
    save_file(random_weights(Config.from_folder(folder), 5), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Engine:
    return engines.load(folder, "int2", "cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Two pictures, and the first with one pixel changed by one step of one colour."""
    rng, where = np.random.default_rng(0), tmp_path_factory.mktemp("pictures")
    a, b = (rng.integers(0, 256, shape, np.uint8) for shape in ((64, 64, 3), (40, 96, 3)))
    changed = a.copy()
    changed[63, 63, 2] ^= 1
    for name, pixels in {"a": a, "b": b, "changed": changed}.items():
        Image.fromarray(pixels).save(where / f"{name}.png")
    return {name: str(where / f"{name}.png") for name in ("a", "b", "changed")}


def asked(*parts: str) -> list[dict]:
    """One message: names of files in order, then text."""
    *images, text = parts
    return [{"role": "user", "content": [*({"type": "image", "image": image} for image in images),
                                         {"type": "text", "text": text}]}]  # fmt: skip


def answer(model: Engine, messages, **how) -> Generation:
    return model.generate(messages, max_tokens=6, ignore_eos=True, **how)


def data_url(file: str) -> str:
    return f"data:image/png;base64,{base64.b64encode(Path(file).read_bytes()).decode()}"


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    code = cli.main([*map(str, argv), "--device", "cpu"])
    found = capsys.readouterr()
    return code, found.out, found.err


# --- the same answer by every way


def test_the_command_line_python_and_jsonl_answer_alike(folder, model, files, capsys, tmp_path) -> None:
    want = answer(model, asked(files["a"], files["b"], WORDS))
    assert want.prompt_tokens == 64 + 60 + 2 * 2 + 4 + len(model.tokenizer.encode(WORDS)) - 1
    common = "--max-tokens", "6", "--ignore-eos", "--kv", "int2"
    code, out, _ = run(
        capsys, "generate", folder, WORDS, "--image", files["a"], "--image", files["b"], "--json", "--debug", *common
    )
    assert code == 0 and json.loads(out)["token_ids"] == want.token_ids
    parts = asked(data_url(files["a"]), files["b"], WORDS)
    parts[0]["content"][1] = {"type": "image_url", "image_url": {"url": files["b"]}}
    (tmp_path / "lines").write_text("\n".join(json.dumps({"messages": of}) for of in (parts, asked("nothing", "a"))))
    code, out, _ = run(capsys, "generate", folder, "--prompts-file", tmp_path / "lines", *common)
    first, second = map(json.loads, out.splitlines())
    assert code == 2 and first["token_ids"] == want.token_ids and "nothing cannot be read" in second["error"]
    other = answer(model, asked(files["b"], files["a"], WORDS))
    assert other.prompt_tokens == want.prompt_tokens and other.token_ids != want.token_ids
    pixels = [Image.open(files["a"]), np.array(Image.open(files["b"]))]
    messages = [{"role": "user", "content": [*({"type": "image", "image": image} for image in pixels),
                                             {"type": "text", "text": WORDS}]}]  # fmt: skip
    assert answer(model, messages).token_ids == want.token_ids


def test_text_alone_is_what_the_same_weights_as_a_qwen3_compute(folder, model, tmp_path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    text = {**raw["text_config"], "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(text))
    weights = load_file(folder / "model.safetensors")
    save_file({name: x for name, x in weights.items() if "visual" not in name}, tmp_path / "model.safetensors")
    qwen3, ids = engines.load(tmp_path, "int2", "cpu", tokenizer=False), list(range(5, 205))
    assert np.array_equal(qwen3.logits(ids), model.logits(ids))
    assert answer(qwen3, ids).token_ids == answer(model, ids).token_ids


def test_info_counts_the_tower(folder, capsys) -> None:
    code, out, _ = run(capsys, "info", folder, "--json")
    report, weights = json.loads(out), load_file(folder / "model.safetensors")
    sizes = {name: x.size for name, x in weights.items()}
    assert code == 0 and report["parameters"] == sum(sizes.values())
    of_tower = sum(size for name, size in sizes.items() if "visual" in name)
    assert report["towers"]["image"]["parameters"] == of_tower and report["weight_bytes"] == 4 * report["parameters"]
    assert f"images: a tower of {of_tower:,} parameters" in run(capsys, "info", folder)[1]


# --- no cache takes one picture for another


def test_one_changed_pixel_and_nothing_behind_it_is_reused(model, files) -> None:
    ids = {name: model.encode(asked(file, WORDS)) for name, file in files.items()}
    assert ids["a"] == model.encode(asked(files["a"], WORDS))
    both = list(zip(ids["a"], ids["changed"], strict=True))
    begin = next(i for i, (a, b) in enumerate(both) if a != b)
    assert ids["a"][begin - 1] == model.tokenizer.special_id("<|vision_start|>")
    assert all(a != b for a, b in both[begin : begin + 64])
    held = model.prefill(asked(files["a"], WORDS))
    with pytest.raises(UserError, match="do not begin with those of the prompt cache"):
        answer(model, asked(files["changed"], WORDS), cache=held)


def test_a_cut_inside_a_picture_is_as_if_it_had_never_been_longer(folder, files) -> None:
    exact = engines.load(folder, "bf16", "cpu")
    messages = exact.opened(asked(files["a"], files["b"], WORDS))
    ids, media = exact.encode(messages), media_of(messages)
    cache = exact.new_cache(1, len(ids))
    want = exact.model.forward(np.array(ids), cache, cache.batch_for([0], [len(ids)]).reading([ids], media))
    for cut in (1, 2, 3, 40, 66, 67, 70, 100, len(ids) - 1):
        assert cache.truncate(0, cut) == cut
        batch = cache.batch_for([0], [len(ids) - cut]).reading([ids], media)
        got = exact.model.forward(np.array(ids[cut:]), cache, batch)
        assert np.abs(got - want).max() < 2e-2 * np.abs(want).max()  # the past is in BF16 now
        assert cache.shifts[0] == batch.inputs.shifts[0] < 0
    cache.truncate(0, 1)
    with pytest.raises(ValueError, match="begins no medium"):
        cache.batch_for([0], [len(ids) - 1]).reading([ids], media[:1])


def test_a_conversation_reads_a_picture_once_and_goes_on_from_a_file(model, files, tmp_path, capsys) -> None:
    talk = Conversation(model, ctx=512)
    options = {"max_tokens": 6, "sampling": Sampling()}
    assert command(talk, f"/image {files['a']}", options) and "64 tokens" in capsys.readouterr().err
    first = "".join(talk.say(WORDS, **options))
    fresh = model.generate(asked(files["a"], WORDS), **options)
    assert (first, talk.last.prefilled_tokens) == (fresh.text, fresh.prompt_tokens)
    talk.show(files["b"])
    second = "".join(talk.say("the dog", **options))
    assert talk.last.prefilled_tokens < talk.last.prompt_tokens - 64
    messages = [*asked(files["a"], WORDS), {"role": "assistant", "content": first}, *asked(files["b"], "the dog")]
    assert second == model.generate(messages, **options).text
    assert json.dumps(summary(talk)) and not talk.shown
    talk.save(tmp_path / "c.safetensors")
    held = model.load_cache(tmp_path / "c.safetensors")
    again = Conversation(model, cache=held, ctx=512)
    third = "".join(again.say("that cat", **options))
    assert again.last.prefilled_tokens < 30  # of text alone: the file has no pixels
    assert third == "".join(talk.say("that cat", **options))
    for one in (talk, again):  # back into the middle of it
        one.undo()
        assert "".join(one.say("that cat", **options)) == third


def test_a_file_goes_on_without_the_pixels_unless_they_are_read_again(model, files, tmp_path) -> None:
    model.prefill(asked(files["a"], files["b"], WORDS)).save(tmp_path / "c.safetensors")
    held = model.load_cache(tmp_path / "c.safetensors")
    assert [medium.data for medium in held.media] == [None, None] and min(held.ids) < 0
    assert held.media == media_of(model.opened(asked(files["a"], files["b"], "")))
    want = answer(model, asked(files["a"], files["b"], WORDS + " and the dog"))
    got = answer(model, asked(files["a"], files["b"], WORDS + " and the dog"), cache=held)
    assert got.token_ids == want.token_ids and got.prefilled_tokens < 20
    more = answer(model, "and the dog", cache=held)  # text goes on in the same message
    parts = [*asked(files["a"], files["b"], WORDS)[0]["content"], {"type": "text", "text": "and the dog"}]
    assert more.token_ids == answer(model, [{"role": "user", "content": parts}]).token_ids
    assert more.prefilled_tokens < 20
    third = answer(model, with_media([{"type": "image", "image": files["changed"]}], "dog", held), cache=held)
    assert 64 < third.prefilled_tokens < 64 + 20 and third.prompt_tokens > 64 + 60 + 64
    short = [{"role": "user", "content": [*held.messages[0]["content"][:1], {"type": "text", "text": "dog"}]}]
    model.model.encoder.kept.clear()
    with pytest.raises(UserError, match="the image of 64 tokens is not there: .*give it again"):
        model.generate(short)
    assert answer(model, asked(files["a"], "dog")).token_ids  # nothing is left half-done


def test_a_damaged_file_never_gives_a_picture_another_place(model, files, tmp_path) -> None:
    path = tmp_path / "c.safetensors"
    held = model.prefill(asked(files["a"], WORDS))
    held.ids[5] -= 1
    held.save(path)
    with pytest.raises(UserError, match="it has token ids outside"):
        model.load_cache(path)


# --- what cannot be read


def png(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    return Image.frombytes("RGB", size, np.random.default_rng(1).integers(0, 256, 3 * size[0] * size[1], np.uint8)
                           .tobytes()).convert(mode)  # fmt: skip


def saved(image: Image.Image, kind: str, **how) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def bomb() -> bytes:
    """The head of a PNG of 10^9 pixels."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 25_000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"\0" * 99)
    made = (struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "text": (lambda: b"this is no picture", "is none of PNG, JPEG"),
    "empty": (lambda: b"", "is none of PNG, JPEG"),
    "10^9 pixels": (bomb, "has .*pixels.*make it smaller"),
    "truncated JPEG": (lambda: saved(png((64, 48)), "JPEG")[:900], "is damaged .*truncated"),
    "another program's": (lambda: saved(png((64, 48)), "EPS"), "is none of PNG, JPEG"),
    "a line": (lambda: saved(png((900, 2)), "PNG"), "more than 200 times as long as wide"),
}


def test_a_picture_that_is_not_there_is_missed_before_the_model_is(capsys) -> None:
    code, _, err = run(capsys, "generate", "no-such-model", WORDS, "--image", "none.png")
    assert code == 2 and "none.png cannot be read" in err and "no-such-model" not in err


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_picture_is_refused_in_one_line(folder, capsys, tmp_path, what) -> None:
    make, reason = BAD[what]
    (tmp_path / "a.png").write_bytes(make())
    code, out, err = run(capsys, "generate", folder, WORDS, "--image", tmp_path / "a.png", "--kv", "bf16")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "a.png" in err
    with pytest.raises(UserError, match=reason):
        Config.from_folder(folder).vision.prepare(make(), "a.png")


def test_turns_colours_alpha_and_frames_become_what_is_seen(capsys) -> None:
    image = png((24, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = np.asarray(pictures.opened(saved(image, "PNG", exif=exif), "a"))
    assert np.array_equal(turned, np.rot90(np.asarray(image), -1))
    for mode, kind in (("CMYK", "TIFF"), ("RGBA", "PNG"), ("L", "PNG"), ("1", "PNG"), ("P", "GIF"), ("I;16", "PNG")):
        source = png((24, 16), "L" if mode == "I;16" else mode)
        data = saved(source.convert("I").convert("I;16") if mode == "I;16" else source, kind)
        assert np.asarray(pictures.opened(data, "a")).shape == (16, 24, 3)
    assert not capsys.readouterr().err
    frames = saved(image, "GIF", save_all=True, append_images=[png((24, 16)).rotate(90), image])
    assert pictures.opened(frames, "a.gif").size == (24, 16)
    assert capsys.readouterr().err == "[a.gif has 3 frames; the first is read]\n"


def test_more_pictures_than_places_and_places_without_pictures_are_refused(folder, model, files, tmp_path) -> None:
    for text in ("<|image_pad|>", "the <|vision_start|><|image_pad|><|vision_end|> cat"):
        with pytest.raises(UserError, match="the prompt has 2 places for 1 images; leave the placeholder out"):
            answer(model, asked(files["a"], text))
        with pytest.raises(UserError, match="1 places for 0 images"):
            answer(model, [{"role": "user", "content": text}])
    medium = media_of(model.opened(asked(files["a"], "")))[0]
    with pytest.raises(UserError, match="the prompt has 0 places for 1 images; the chat template shows fewer"):
        expanded([1, 2], [medium], model.config.towers)
    with pytest.raises(UserError, match="outside 0"):  # ids of a picture without it
        answer(model, [5, *medium.ids])


def test_what_image_does_not_go_with_is_said(folder, files, capsys, tmp_path) -> None:
    (tmp_path / "lines").write_text('"a"\n')
    for argv, why in (
        ((WORDS, "--raw"), "--raw continues a plain text"),
        (("--prompts-file", tmp_path / "lines"), "name their own"),
    ):
        code, _, err = run(capsys, "generate", folder, *argv, "--image", files["a"])
        assert code == 2 and "--image has no place here: " in err and why in err
    url = asked("http://example.com/a.png", WORDS)
    with pytest.raises(UserError, match="on the network, from which nothing is fetched"):
        engines.load(folder, "bf16", "cpu").generate(url)


# --- the server


def of_url(*urls: str) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": "auto"}} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": WORDS}]}], "temperature": 0,
            "max_tokens": 6, "ignore_eos": True}  # fmt: skip


def test_the_server_reads_data_urls_and_files_of_its_folder_and_reuses_no_other_picture(model, files) -> None:
    where = Path(files["a"]).parent
    app, scheduler = assemble(model, Plan(2, 512, 128, None, "m", images=str(where)), Sampling())
    scheduler.post = lambda news: [job.tell(event) for job, event in news]
    scheduler.start()
    try:
        data = data_url(files["b"])
        cached = []
        for name in ("a", "changed", "a"):
            urls = [f"file://{files[name]}", data]
            [job] = bodies.chat(of_url(*urls), app.service).jobs
            events: queue.Queue[Event] = queue.Queue()
            job.tell = events.put
            scheduler.submit([job])
            tokens, event = [], None
            while event is None or not event.finish_reason:
                event = events.get(timeout=PATIENCE)
                assert event.error is None
                tokens.append(event.token)
            names = [files["b"] if url.startswith("data") else url.removeprefix("file://") for url in urls]
            assert tokens == answer(model, asked(*names, WORDS)).token_ids
            cached.append(job.cached)
    finally:
        scheduler.close()
    assert cached[:2] == [0, 0] and cached[2] >= prefixes.LEAST


def test_the_server_opens_nothing_else(model, files, tmp_path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.png").symlink_to(files["a"])
    app, scheduler = assemble(model, Plan(1, 128, 128, None, "m", images=str(tmp_path / "in")), Sampling())
    inside = f"file://{tmp_path}/in"
    urls = ["http://127.0.0.1/a.png", f"file://{files['a']}", f"{inside}/../in/link.png", files["a"], "a.png",
            f"{inside}/none.png", "file:///etc/passwd", "data:image/png;base64,????"]  # fmt: skip
    bodies_of = [of_url(url) for url in urls]
    bodies_of.append({"messages": asked(files["a"], WORDS)})  # by the name that Python programs may give
    for body in bodies_of:
        with pytest.raises(ApiError) as error:
            bodies.chat(body, app.service)
        assert error.value.status == 400 and "\n" not in str(error.value)
    app.service.images = None
    with pytest.raises(ApiError, match="is not fetched; send a data: URL"):
        bodies.chat(of_url(f"file://{files['a']}"), app.service)
    app.service.towers = {}
    with pytest.raises(ApiError, match="this model reads no images"):
        bodies.chat(of_url(data_url(files["a"])), app.service)
    scheduler.close()
