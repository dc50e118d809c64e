"""Streamed text is decoded text, for every decoder chain and behind any prompt."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, Regex, decoders, models
from tokenizers import Tokenizer as Library

from minioscar.detokenizer import Detokenizer

WORDS = [
    "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in (0xE2, 0x82, 0xAC, 0xFF, 0x41)), "▁", "▁▁", "▁The", "a", "b", "##b",
    "##", "."
]
WORDS += [
    "'s", "n't", "x</w>", "a</w>b", "</w>", "<pad>", "|", "é", "日", "Ġthe", "â", "Ĥ", "¬", "ÿ", " ", "  ", "\ufffd"
]
SPECIAL = frozenset((0, 1))
SPACE, BYTES = decoders.Replace("▁", " "), decoders.ByteFallback()
FUSE, STRIP = decoders.Fuse(), decoders.Strip(" ", 1, 0)
BYTE_LEVEL, METASPACE = decoders.ByteLevel(), decoders.Metaspace(prepend_scheme="first")
CHAINS = {
    "byte_level": BYTE_LEVEL,
    "byte_level_in_a_sequence": decoders.Sequence([BYTE_LEVEL]),
    "byte_level_deeper": decoders.Sequence([decoders.Sequence([BYTE_LEVEL]), FUSE]),
    "byte_level_then_more": decoders.Sequence([BYTE_LEVEL, decoders.Replace("a", "bb"), decoders.Strip("b", 2, 0)]),
    "byte_level_last": decoders.Sequence([SPACE, BYTE_LEVEL]),
    "llama": decoders.Sequence([SPACE, BYTES, FUSE, STRIP]),
    "gemma": decoders.Sequence([SPACE, BYTES, FUSE]),
    "metaspace": decoders.Metaspace(),
    "metaspace_never": decoders.Metaspace(prepend_scheme="never"),
    "bytes_and_metaspace": decoders.Sequence([BYTES, METASPACE]),
    "metaspace_of_all": decoders.Sequence([FUSE, METASPACE]),
    "word_piece": decoders.WordPiece(),
    "word_piece_as_is": decoders.WordPiece(cleanup=False),
    "bpe": decoders.BPEDecoder(),
    "bpe_stripped": decoders.Sequence([decoders.BPEDecoder(), STRIP]),
    "ctc": decoders.CTC(),
    "fuse": FUSE,
    "byte_fallback": BYTES,
    "none": None,
    "strip_three": decoders.Sequence([SPACE, FUSE, decoders.Strip(" ", 3, 0)]),
    "strip_each": decoders.Sequence([SPACE, STRIP]),
    "strip_behind": decoders.Sequence([FUSE, decoders.Strip("b", 0, 1)]),
    "replace_across_tokens": decoders.Sequence([FUSE, decoders.Replace("▁▁", "  ")]),
    "replace_by_pattern": decoders.Sequence(
        [decoders.Replace(Regex("a+"), "b"), FUSE, decoders.Replace(Regex("b+"), "c")]
    ),
}


def library(chain: str) -> Library:
    made = Library(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    made.decoder = CHAINS[chain]
    made.add_special_tokens(["<s>", "</s>"])
    made.add_tokens([AddedToken("<think>"), AddedToken("<né>")])
    return made


def pieces(made: Library, ids: list[int], before: list[int]) -> list[str]:
    stream = Detokenizer(made, SPECIAL, before)
    return [*(stream.add(i) for i in ids), stream.flush()]


@pytest.mark.parametrize("chain", CHAINS)
def test_streamed_is_decoded_from_the_beginning_and_behind_a_prompt(chain):
    made, seed = library(chain), random.randrange(2**32)
    rng = random.Random(seed)
    for _ in range(400):
        ids = [rng.randrange(len(WORDS) + 4) for _ in range(rng.randrange(9))]  # added tokens, rows without one
        # the library panics where there is nothing to strip
        ids = ids if chain != "strip_behind" else [WORDS.index("a"), *ids]
        whole, cut = made.decode(ids), rng.randrange(len(ids) + 1)
        assert "".join(pieces(made, ids, [])) == whole, (seed, ids)
        prompt = made.decode(ids[:cut]) if cut or chain != "strip_behind" else ""
        if whole.startswith(prompt):  # not where the rest makes another character of the prompt's last bytes
            assert prompt + "".join(pieces(made, ids[cut:], ids[:cut])) == whole, (seed, ids, cut)


@pytest.mark.parametrize("chain", ["byte_level_in_a_sequence", "llama", "gemma", "bytes_and_metaspace"])
def test_no_piece_ends_within_a_character(chain):
    made = library(chain)
    euro = "â Ĥ ¬" if "level" in chain else "<0xE2> <0x82> <0xAC>"
    ids = [made.token_to_id(word) for word in f"a {euro} b {euro} <think> {euro}".split()]
    assert "".join(pieces(made, ids, [])) == made.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces(made, ids, []))


def test_a_space_is_stripped_at_the_beginning_of_a_text_and_nowhere_else():
    made = library("llama")
    the, think = WORDS.index("▁The"), len(WORDS)
    assert "".join(pieces(made, [0, the, think, the], [])) == "The<think> The"
    assert "".join(pieces(made, [the], [0, the])) == " The"
    assert "".join(pieces(made, [the], [0, *[the] * 500, 0])) == " The"  # however far back the prompt's text is
    assert "".join(pieces(made, [the], [0] * 500)) == "The"  # special tokens are no text


def test_a_character_that_the_prompt_begins_appears_with_its_last_byte():
    made = library("byte_level")
    ids = [WORDS.index(word) for word in ("a", "â", "Ĥ", "¬", "b")]
    assert pieces(made, ids[3:], ids[:3]) == ["€", "b", ""]


def test_the_librarys_own_stream_is_not_the_decoded_text():
    """Why there is a Detokenizer. Where this fails, tokenizers' DecodeStream has become better."""
    made = library("llama")
    ids = [WORDS.index(word) for word in ("a", "<0xE2>", "<0x82>", "<0xAC>", "<0xFF>")]
    stream = decoders.DecodeStream(skip_special_tokens=True)
    printed = "".join(stream.step(made, i) or "" for i in ids)
    assert printed != made.decode(ids) == "".join(pieces(made, ids, []))
    stream = decoders.DecodeStream(skip_special_tokens=True)
    assert "".join(stream.step(made, i) or "" for i in ids[:2]) == "a" != made.decode(ids[:2]) == "a\ufffd"
