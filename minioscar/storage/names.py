"""Names of tensors, of a model with towers, as one spelling has them: the text model's like a text model's own."""

from __future__ import annotations

import re

# In turn: of Qwen3-Omni's files, of Qwen3-VL's, of LLaVA's, and of LLaVA's as transformers 5 writes them.
SPELLINGS = [
    (re.compile(pattern), plain) for pattern, plain in (
        (r"^thinker\.visual\.", "model.visual."),
        (r"^thinker\.", ""),
        (r"^model\.visual\.merger_list\.", "model.visual.deepstack_merger_list."),
        (r"^(model\.visual\..*merger.*)\.ln_q\.", r"\1.norm."),
        (r"^(model\.visual\..*merger.*)\.mlp\.0\.", r"\1.linear_fc1."),
        (r"^(model\.visual\..*merger.*)\.mlp\.2\.", r"\1.linear_fc2."),
        (r"^model\.language_model\.", "model."),
        (r"^language_model\.(?=model\.|lm_head\.)", ""),
        (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    )
]


def plain(name: str) -> str:
    """What minioscar calls a tensor that a file calls `name`."""
    for pattern, replacement in SPELLINGS:
        name = pattern.sub(replacement, name)
    return name
