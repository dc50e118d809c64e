"""Text and chats through a whole model that says what it is told to: where answers end, which space they begin with,
what templates get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from minioscar import engine
from minioscar.app import cli
from minioscar.app.conversation import Conversation
from minioscar.engine import Engine
from minioscar.errors import UserError

PROMPT = "The capital of France is"
CHATML = (
    "{% if style is defined %}{{ style }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if thinking is defined and thinking is false %}</t>{% endif %}{% endif %}"
)


def sentencepiece() -> Library:
    """As Llama 2 and Mistral have it: ▁ for the space in front of a word, bytes for what has no token."""
    words = [f"▁{word}" for word in f"{PROMPT} Paris".split()]
    begun = [word[: n + 1] for word in words for n in range(len(word))]  # ▁, ▁T, ▁Th, ▁The, ...
    letters = sorted(set("".join(words)) | set(".a"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys([*letters, *begun])]
    merges = dict.fromkeys((part[:-1], part[-1]) for part in begun if len(part) > 1)
    library = Library(
        models.BPE({token: i for i, token in enumerate(tokens)}, list(merges), unk_token="<unk>", byte_fallback=True)
    )
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    library.add_tokens([AddedToken("[/INST]", normalized=False)])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return library


def byte_level() -> Library:
    library = Library(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_special_tokens(
        [AddedToken(f"<|{name}|>", normalized=False) for name in ("user", "assistant", "system", "end")]
    )
    return library


def told(folder: Path, library: Library, follows: dict[int, int], **files: Any) -> Engine:
    """A model after whose token a comes follows[a]. Attention and MLP add nothing. files: name without .json ->
    content."""
    vocab = hidden = library.get_vocab_size()
    folder.mkdir(parents=True)
    embed = np.linalg.qr(np.random.default_rng(0).standard_normal((vocab, hidden)))[0].astype(np.float32)
    head = np.zeros((vocab, hidden), np.float32)
    for a, b in follows.items():
        head[b] += 50 * embed[a]
    layer, one = "model.layers.0.", np.ones(hidden, np.float32)
    tensors = {"model.embed_tokens.weight": embed, "lm_head.weight": head, "model.norm.weight": one}
    tensors |= {f"{layer}{name}_layernorm.weight": one for name in ("input", "post_attention")}
    tensors |= {f"{layer}self_attn.{x}_proj.weight": np.zeros((32, hidden), np.float32) for x in "qkv"}
    tensors |= {f"{layer}mlp.{x}_proj.weight": np.zeros((32, hidden), np.float32) for x in ("gate", "up")}
    tensors |= {f"{layer}{x}.weight": np.zeros((hidden, 32), np.float32) for x in ("self_attn.o_proj", "mlp.down_proj")}
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": 32,
        "num_hidden_layers": 1
    }
    config |= {
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6
    }
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False})
    )
    library.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return engine.load(folder, "bf16", "cpu")


def chain(library: Library, *words: str) -> dict[int, int]:
    ids = [library.token_to_id(word) for word in words]
    assert None not in ids
    return dict(zip(ids, ids[1:], strict=False))


@pytest.fixture(scope="module")
def french(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Says " Paris." after "is" and after [/INST]."""
    library = sentencepiece()
    follows = chain(library, "▁is", "▁Paris", ".", "</s>") | chain(library, "[/INST]", "▁Paris")
    config = {
        "eos_token": "</s>", "chat_template": "{{ bos_token }}[INST] {{ messages[-1].content }} [/INST]",
        "bos_token": "<s>"
    }
    return told(tmp_path_factory.mktemp("french") / "m", library, follows, tokenizer_config=config)


def test_a_plain_text_goes_on_with_its_space(french):
    assert french.generate(PROMPT, chat=False).text == " Paris."
    assert "".join(french.stream(PROMPT, chat=False)) == " Paris."
    assert french.generate(french.encode(PROMPT, False)).text == " Paris."
    assert french.generate(
        "is", chat=False, cache=french.prefill("The capital of France ", chat=False)
    ).text == " Paris."
    assert [one.text for one in french.generate([PROMPT, "is"], chat=False)] == [" Paris."] * 2


def test_a_stop_string_may_begin_with_the_space(french):
    for stop, text in ((" Paris", ""), ("Paris", " "), (" ", ""), (" Paris.", ""), (".", " Paris"), ("x", " Paris.")):
        result = french.generate(PROMPT, chat=False, stop=[stop])
        assert (result.text, result.finish_reason) == (text, "stop")


def test_tokens_of_logprobs_together_are_the_text(french):
    result = french.generate(PROMPT, chat=False, logprobs=1)
    assert "".join(one.token for one in result.logprobs) == result.text == " Paris."


def test_an_answer_in_a_chat_begins_without_the_space_which_the_template_writes(french):
    assert french.generate(PROMPT).text == french.generate([{"role": "user", "content": PROMPT}]).text == "Paris."
    conversation = Conversation(french, ctx=128)
    assert "".join(conversation.say(PROMPT)) == "Paris." == conversation.messages[-1]["content"]


@pytest.mark.parametrize("kind", [byte_level, sentencepiece])
@pytest.mark.parametrize("tokens", [2, 3, 4, 5, 6, 7, 8])
def test_half_a_character_never_enters_a_conversation(tmp_path, kind, tokens):
    """Cut after each byte of "€日" (2 ... 7 of them with the letter before them): what is whole stays."""
    library, text = kind(), "a€日".encode()
    names = [f"<0x{byte:02X}>" if kind is sentencepiece else _letter(byte) for byte in text]
    names[0] = "a"
    start = "[/INST]" if kind is sentencepiece else "<|assistant|>"
    template = "{{ messages[-1].content }}[/INST]" if kind is sentencepiece else CHATML
    model = told(tmp_path / "m", library, chain(library, start, *names), tokenizer_config={"chat_template": template})
    conversation = Conversation(model, ctx=128)
    said = "".join(conversation.say("hm", max_tokens=min(tokens, len(names))))
    whole = "a" + "€" * (tokens >= 4) + "日" * (tokens >= 7)
    assert said == conversation.messages[-1]["content"] == conversation.last.text == whole
    # as `decode` has it
    assert model.generate("hm", max_tokens=min(tokens, len(names))).text.rstrip("\ufffd") in (whole, "a")
    "".join(conversation.say("so", max_tokens=1))
    assert conversation.messages[1]["content"] == whole


@pytest.mark.parametrize(("stops", "text", "tokens"), [
    (["b<|user|>"], "a", 3), (["b<|user|>c"], "a", 4), (["<|user|>c"], "ab", 4), (["<|user|>cX", "d"], "abc", 5),
    (["b<|user|>c<|user|>"], "abcd", 5), (["bc<|system|>", "bc"], "a", 4), (["ab<|user|>cd", "c<|user|>"], "", 5),
])  # fmt: skip
def test_a_special_token_within_a_stop_string_is_that_token(tmp_path, stops, text, tokens):
    """Its name is no text of the answer, so that "<|end|>\\n" would never match; what is no whole match comes out as it
    was."""
    library = byte_level()
    follows = chain(library, "<|assistant|>", "a", "b", "<|user|>", "c", "d", "<|end|>")
    config = {"eos_token": "<|end|>", "chat_template": CHATML}
    model = told(tmp_path / "m", library, follows, tokenizer_config=config)
    found = model.generate("hm", stop=stops)
    assert (found.text, found.new_tokens, found.finish_reason) == (text, tokens, "stop")
    assert "".join(model.stream("hm", stop=stops)) == text


def _letter(byte: int) -> str:
    from minioscar.detokenizer import BYTES

    return {value: letter for letter, value in BYTES.items()}[byte]


# --- the chat template, from the command line and from Python


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers o behind the header, and k behind the </t> that thinking=false adds to it."""
    library, path = byte_level(), tmp_path_factory.mktemp("chatml") / "m"
    follows = chain(library, "<|assistant|>", "o", "<|end|>") | chain(library, ">", "k", "<|end|>")
    told(path, library, follows, tokenizer_config={"eos_token": "<|end|>", "chat_template": CHATML})
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    code = cli.main([*map(str, argv), "--device", "cpu"])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_template_arguments_reach_the_template_from_every_command(folder, capsys, tmp_path, monkeypatch):
    assert run(capsys, "generate", folder, "a")[1] == "o\n"
    assert run(capsys, "generate", folder, "a", "--template-arg", "thinking=false")[1] == "k\n"
    assert run(
        capsys, "generate", folder, "a", "--template-arg", "thinking=no", "--template-arg", "style=<x>"
    )[1] == "o\n"
    (tmp_path / "lines").write_text(
        '"a"\n{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}\n'
    )
    code, out, _ = run(
        capsys, "generate", folder, "--prompts-file", tmp_path / "lines", "--template-arg", "thinking=false"
    )
    assert code == 0 and [json.loads(line)["text"] for line in out.splitlines()] == ["k", "k"]
    (tmp_path / "text").write_text("a")
    saved = tmp_path / "c.kv.safetensors"
    assert run(
        capsys, "cache", folder, "--prompt-file", tmp_path / "text", "--out", saved, "--template-arg", "style=<x>"
    )[0] == 0
    arguments = ("--template-arg", "style=<x>", "--template-arg", "thinking=false")
    code, out, err = run(capsys, "generate", folder, "b", "--cache", saved, *arguments)
    assert out == "k\n" and "more from the cache" in err


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("thinking", "must be NAME=VALUE"),
        ("=false", "must be NAME=VALUE"),
        ("thinkin=false", "no variable 'thinkin' to set; it has: style, thinking"),
        ("messages=[]", "messages"),
        ("tools=[]", "'tools' would overwrite"),
        ("chat_template=rag", "no chat template"),
    ],
)
def test_a_template_argument_that_cannot_be_is_one_line(folder, capsys, argument, reason):
    code, out, err = run(capsys, "generate", folder, "a", "--template-arg", argument)
    assert (code, out) == (2, "") and reason in err and err.count("\n") == 1


def test_template_arguments_need_the_template(folder, capsys):
    code, _, err = run(capsys, "generate", folder, "a", "--raw", "--template-arg", "thinking=false")
    assert code == 2 and "--raw leaves out" in err
    code, _, err = run(capsys, "generate", folder, "a", *["--template-arg", "thinking=false"] * 2)
    assert code == 2 and "given twice" in err


def test_advice_about_templates_exists_in_the_command_that_gives_it(folder, capsys, tmp_path, monkeypatch):
    broken = tmp_path / "m"
    broken.mkdir()
    for path in folder.iterdir():
        (broken / path.name).symlink_to(path)
    (broken / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    (tmp_path / "text").write_text("a")
    monkeypatch.setattr("sys.stdin", open(tmp_path / "text"))
    ways = {
        "use --raw\n": [
            ("generate", broken, "a"), ("cache", broken, "--prompt-file", tmp_path / "text", "--out", tmp_path / "c")
        ],
        "use generate --raw\n": [("chat", broken)],
    }
    for way, commands in ways.items():
        for command in commands:
            code, _, err = run(capsys, *command)
            assert code == 2 and err.endswith(f"the chat template failed (no); {way}")
    (tmp_path / "lines").write_text('"a"\n')
    assert run(
        capsys, "generate", broken, "--prompts-file", tmp_path / "lines"
    )[1].count("failed (no); use --raw\"}") == 1
    with pytest.raises(UserError, match=r"failed \(no\); .*chat=False"):
        engine.load(broken, "bf16", "cpu").generate("a")


def test_parts_that_are_no_text_are_refused_by_name(folder, capsys, tmp_path):
    picture = [{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": "cat.png"}}]
    (tmp_path / "lines").write_text(json.dumps({"messages": [{"role": "user", "content": picture}]}))
    code, out, _ = run(capsys, "generate", folder, "--prompts-file", tmp_path / "lines")
    assert code == 2
    assert json.loads(out)["error"] == "this model reads no images; send it text alone"
    picture[1]["type"] = "film"
    kinds = "part 'film'; only parts of the types 'text', 'image', 'audio' and 'video' can be read"
    with pytest.raises(UserError, match=kinds):
        engine.load(folder, "bf16", "cpu").generate([{"role": "user", "content": picture}])


def test_a_prompt_cache_of_parts_goes_on_as_parts(folder):
    model = engine.load(folder, "bf16", "cpu")
    cache = model.prefill([{"role": "user", "content": [{"type": "text", "text": "a"}]}])
    assert cache.followed_by("b") == [{"role": "user", "content": [{"type": "text", "text": text} for text in "ab"]}]
    assert model.generate("b", cache=cache).text == "o"
