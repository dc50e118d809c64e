"""The reader's tokenizer: a token for every printable character of ASCII and for the end of a line."""

from __future__ import annotations

import json
from pathlib import Path

SPECIAL = "<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
SPECIAL += "<|unused_6|>", "<|unused_7|>"
CHARACTERS = [*map(chr, range(32, 127)), "\n"]
TEMPLATE = (
    "{%- for message in messages -%}{%- if message.content is string -%}{{ message.content }}{%- else -%}"
    "{%- for part in message.content -%}{%- if part.type == 'text' -%}{{ part.text }}{%- else -%}"
    "<|vision_start|><|image_pad|><|vision_end|>{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- if message.role == 'assistant' -%}<|im_end|>{%- endif -%}{%- endfor -%}"
)


def write_tokenizer(folder: Path, size: int) -> None:
    """tokenizer.json and tokenizer_config.json. size: of the model's vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    names = [*SPECIAL, *CHARACTERS]
    assert len(names) == size
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
              "model_max_length": 4096, "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
