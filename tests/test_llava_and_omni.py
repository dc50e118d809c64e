"""LLaVA and Qwen3-Omni as whole models: what transformers answers, from files of pictures and sound to text.

The references are committed in tests/fixtures; make_tower_fixtures.py made them and says what is in them.
"""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, processors

from minioscar.app.cli import main
from minioscar.app.conversation import Conversation
from minioscar.cache import Cache
from minioscar.engine import Engine, load
from minioscar.errors import Failure, UserError
from minioscar.generation import Prompts
from minioscar.options import Options
from minioscar.serve.errors import ApiError
from minioscar.serve.messages import messages_of
from minioscar.towers.media import Medium, media_of, opened

from .make_fixtures import CLEAR, FIXTURES
from .make_tower_fixtures import AUDIO, IMAGE, OMNI_PROMPTS, PROMPTS, VOCAB, picture, sound

TOLERANCE = 4e-5  # of the largest logit, as test_pictures.py has it; 2e-6 is measured
CASES = {"llava-next": PROMPTS, "llava": PROMPTS, "qwen3-omni": OMNI_PROMPTS}
ALL = [(case, number) for case, prompts in CASES.items() for number in range(len(prompts))]
SHORT = [(case, number) for case, number in ALL if (case, number) not in (("llava-next", 3), ("llava-next", 4))]
NAMES = {IMAGE: "<image>", AUDIO: "<audio>"}  # of placeholders, in the tokenizer that these tests make
TEMPLATE = """{% for message in messages %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}
{% else %}<{{ part.type }}>{% endif %}{% endfor %}{% endfor %}"""


@cache
def reference(case: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / case / "reference.npz") as arrays:
        return dict(arrays)


@cache
def engine(case: str, kv: str = "bf16") -> Engine:
    return load(FIXTURES / case, kv=kv, device="cpu", tokenizer=False)


def words(ids: list[int]) -> str:
    return " ".join(f"t{i:02}" for i in ids)


def parts(case: str, number: int) -> list[dict[str, Any]]:
    """A prompt as the parts of a message, its media as arrays."""
    found, ids, waiting = [], [], iter(CASES[case][number])
    prompt = reference(case)[f"prompt_{number}"].tolist()
    left = 0  # placeholders of the medium that was added last
    for i in prompt:
        if i not in NAMES:
            ids.append(i)
            continue
        if left:
            left -= 1
            continue
        one = next(waiting)
        kind = "audio" if isinstance(one, float) else "image"
        source = sound(one) if kind == "audio" else picture(one)
        medium = engine(case).config.towers[kind].prepare(source, kind)
        found += [{"type": "text", "text": words(ids)}] if ids else []
        found, ids, left = [*found, {"type": kind, kind: source}], [], medium.tokens - 1
    return [*found, {"type": "text", "text": words(ids)}]


def encoded(model: Engine, case: str, number: int) -> tuple[list[int], list[Medium]]:
    """A prompt's ids and media, without a tokenizer."""
    ids, media = [], []
    for part in parts(case, number):
        kind = part["type"]
        media += [] if kind == "text" else [model.config.towers[kind].prepare(part[kind], kind)]
        ids += [int(word[1:]) for word in part["text"].split()] if kind == "text" else media[-1].ids
    return ids, media


def folder(tmp_path: Path, case: str, adds_bos: bool = False) -> Path:
    """The model with a tokenizer whose words are t00, t01, ..., and a chat template."""
    for file in (FIXTURES / case).iterdir():
        (tmp_path / file.name).symlink_to(file)
    vocab = {NAMES.get(i, f"t{i:02}"): i for i in range(VOCAB)}
    library = Library(models.WordLevel(vocab, "t00"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(list(NAMES.values()))
    if adds_bos:
        library.post_processor = processors.TemplateProcessing(single="t01:0 $A:0", special_tokens=[("t01", 1)])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "bos_token": "t01"}))
    return tmp_path


def greedy(model: Engine, prompts: list[list[dict[str, Any]]], tokens: int) -> list[list[int]]:
    """The answers of one batch."""
    chats = [[{"role": "user", "content": content}] for content in prompts]
    return [answer.token_ids for answer in model.generate(chats, max_tokens=tokens)]


# --- as transformers


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_answers_are_those_of_transformers_alone_and_in_a_ragged_batch(
    case: str, tmp_path: Path
) -> None:
    expected, model = reference(case), load(folder(tmp_path, case), kv="bf16", device="cpu")
    prompts = [parts(case, number) for number in range(len(CASES[case]))]
    for number, content in enumerate(prompts):
        logits, gap = expected[f"logits_{number}"], expected[f"gap_{number}"]
        encoded = model._encode([{"role": "user", "content": content}], None, None, None)
        kept = Cache(model.config, model.scheme, 1, len(logits), model.ops)
        batch = kept.batch_for([0], [len(logits)]).reading([encoded.ids], encoded.media)
        ours = model.model.forward(np.array(encoded.ids), kept, batch, every=True)
        assert np.abs(ours - logits).max() < TOLERANCE * np.abs(logits).max()
        assert len(gap) >= 8 and gap.min() > CLEAR * np.abs(logits).max()
        assert greedy(model, [content], len(gap)) == [expected[f"greedy_{number}"].tolist()]
    together = greedy(model, prompts, len(gap))
    assert together == [expected[f"greedy_{number}"].tolist() for number in range(len(prompts))]


@pytest.mark.parametrize("kv", ["int2", "oscar"])
@pytest.mark.parametrize(("case", "number"), SHORT)
def test_answers_within_the_window_are_those_of_transformers_whatever_the_cache_is(
    case: str, number: int, kv: str
) -> None:
    model, expected = engine(case, kv), reference(case)
    ids, media = encoded(model, case, number)
    answer = expected[f"greedy_{number}"].tolist()
    run = model.run(Prompts([ids], media=media), model.new_cache(1, 256), Options(max_tokens=len(answer)))
    for _ in run:
        pass
    assert len(ids) <= 128 and run.results[0].token_ids == answer


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["llava", "llava-next"])
def test_a_card_in_bfloat16_is_near_transformers_in_float32(case: str) -> None:
    """1 % of the largest logit on the simulator (measured); experts may be others in BF16, so none are here."""
    model = load(FIXTURES / case, kv="bf16", device="cuda", tokenizer=False)
    for number in range(len(CASES[case])):
        ids, media = encoded(model, case, number)
        kept = Cache(model.config, model.scheme, 1, len(ids), model.ops)
        batch = kept.batch_for([0], [len(ids)]).reading([ids], media)
        ours, theirs = model.model.forward(np.array(ids), kept, batch, every=True), reference(case)[f"logits_{number}"]
        assert np.abs(ours - theirs).max() < 0.04 * np.abs(theirs).max()


# --- from files


def test_generate_sees_a_picture_and_hears_a_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The flags put media in front of the text, pictures first."""
    model = folder(tmp_path, "qwen3-omni")
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    soundfile.write(tmp_path / "b.wav", sound(0.5), 16000, subtype="FLOAT")
    flags = ["--device", "cpu", "--kv", "bf16", "--max-tokens", "4", "--json"]
    files = ["--audio", str(tmp_path / "b.wav"), "--image", str(tmp_path / "a.png")]
    assert main(["generate", str(model), "t05 t06", *files, *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    media = [{"type": "image", "image": picture(0)}, {"type": "audio", "audio": sound(0.5)}]
    content = [*media, {"type": "text", "text": "t05 t06"}]
    loaded = load(model, kv="bf16", device="cpu")
    answer = loaded.generate([{"role": "user", "content": content}], max_tokens=4)
    assert found["token_ids"] == answer.token_ids and found["prompt_tokens"] == answer.prompt_tokens == 2 + 7 + 15
    assert main(["generate", str(model), "t05", "--audio", str(tmp_path / "gone.wav"), *flags]) == 2
    captured = capsys.readouterr()
    assert "gone.wav is no file" in captured.err and not captured.out


def test_the_server_takes_sound_in_base64_and_opens_no_file(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", sound(0.5), 16000, subtype="FLOAT")
    towers = engine("qwen3-omni").config.towers

    def read(part: dict[str, Any]) -> Medium:
        [message] = messages_of({"messages": [{"role": "user", "content": [part]}]})
        return media_of(opened([message], towers))[0]

    data = base64.b64encode((tmp_path / "a.wav").read_bytes()).decode()
    heard = read({"type": "input_audio", "input_audio": {"data": data, "format": "wav"}})
    assert heard == towers["audio"].prepare(str(tmp_path / "a.wav"), "a.wav") and heard.tokens == 7
    for part in (
        {"type": "audio", "audio": str(tmp_path / "a.wav")}, {"type": "input_audio", "input_audio": str(tmp_path)},
        {"type": "input_audio", "input_audio": {"url": "file:///etc/passwd"}}, {"type": "input_audio"},
    ):  # fmt: skip
        with pytest.raises(ApiError, match='a sound must be {"type": "input_audio"'):
            read(part)
    with pytest.raises(UserError, match="the audio: its data is not base64"):
        read({"type": "input_audio", "input_audio": {"data": "no base64!"}})


def test_llava_has_a_bos_where_its_template_writes_none(tmp_path: Path) -> None:
    model = load(folder(tmp_path, "llava", adds_bos=True), kv="bf16", device="cpu")
    medium = model.config.vision.prepare(picture(0), "picture")
    content = [{"type": "text", "text": "t07"}, {"type": "image", "image": medium}, {"type": "text", "text": "t08"}]
    assert model.encode([{"role": "user", "content": content}]) == [1, 7, *medium.ids, 8]
    assert model.encode([{"role": "user", "content": [{"type": "text", "text": "t01 t07"}]}]) == [1, 7]


def test_a_model_that_hears_nothing_says_so(tmp_path: Path) -> None:
    model = load(folder(tmp_path, "llava"), kv="bf16", device="cpu")
    with pytest.raises(UserError, match="this model reads no audios; send it text alone"):
        model.generate([{"role": "user", "content": [{"type": "audio", "audio": sound(0.5)}]}])


def test_debug_looks_into_a_tower_and_names_what_is_not_finite(tmp_path: Path) -> None:
    model = load(folder(tmp_path, "llava"), kv="bf16", device="cpu", debug=True)
    chat = [{"role": "user", "content": [{"type": "image", "image": picture(0)}, {"type": "text", "text": "t07"}]}]
    assert model.generate(chat, max_tokens=2).new_tokens == 2
    model.model.encoder.kept.clear()
    name = "vision_tower.vision_model.encoder.layers.1.mlp.fc1"
    model.model.weights.towers["image"][f"{name}.bias"][3] = np.nan
    with pytest.raises(Failure, match=f"image tower, {name}.weight: .* its bias is not finite"):
        model.generate(chat, max_tokens=2)


def test_a_chat_goes_on_behind_a_sound_and_its_file_needs_no_samples(tmp_path: Path) -> None:
    model = load(folder(tmp_path, "qwen3-omni"), kv="int2", device="cpu")
    soundfile.write(tmp_path / "a.wav", sound(0.5), 16000, subtype="FLOAT")
    talk = Conversation(model, ctx=256)
    assert [medium.tokens for medium in talk.show(str(tmp_path / "a.wav"), "audio")] == [7]
    first = "".join(talk.say("t07 t08", max_tokens=4))
    content = [{"type": "audio", "audio": sound(0.5)}, {"type": "text", "text": "t07 t08"}]
    assert first == model.generate([{"role": "user", "content": content}], max_tokens=4).text
    talk.save(tmp_path / "kept.safetensors")
    second = "".join(talk.say("t09", max_tokens=4))
    (tmp_path / "a.wav").unlink()
    again = Conversation(model, cache=model.load_cache(tmp_path / "kept.safetensors"), ctx=256)
    assert "".join(again.say("t09", max_tokens=4)) == second


@pytest.mark.parametrize(("case", "kind"), [("llava-next", "image"), ("qwen3-omni", "audio")])
def test_of_a_cached_prompt_only_what_is_before_another_picture_or_sound_is_used(
    case: str, kind: str, tmp_path: Path
) -> None:
    model = load(folder(tmp_path, case), kv="bf16", device="cpu")
    source = picture(0) if kind == "image" else sound(0.5)
    other = source.copy()
    other[3] += 1
    text = [{"type": "text", "text": "t07 t08 t09"}], [{"type": "text", "text": "t04 t05"}]
    first, second = ([*text[0], {"type": kind, kind: one}, *text[1]] for one in (source, other))
    kept = model.prefill([{"role": "user", "content": first}])
    answers = [model.generate([{"role": "user", "content": of}], max_tokens=4, cache=kept) for of in (first,)]
    assert answers[0].prefilled_tokens < 5
    alone = model.generate([{"role": "user", "content": first}], max_tokens=4)
    assert answers[0].token_ids == alone.token_ids and alone.prefilled_tokens == alone.prompt_tokens
    with pytest.raises(UserError, match="do not begin with those of the prompt cache"):
        model.generate([{"role": "user", "content": second}], max_tokens=4, cache=kept)
