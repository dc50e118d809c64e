"""minioscar: Llama/Qwen-style models on NumPy or CuPy, with the 2-bit KV cache of OScaR (arXiv 2605.19660).

>>> import minioscar
>>> m = minioscar.load("smollm2-135m", device="cpu")    # a folder, a name under weights/, or a Hugging Face id
>>> m.generate("The capital of France is", chat=False, max_tokens=2).text
' Paris.'
>>> [answer.text for answer in m.generate(["One, two, three,", "Monday, Tuesday,"], chat=False, max_tokens=2)]
[' four,', ' Wednesday,']
>>> for piece in m.stream("The capital of France is", chat=False, max_tokens=2):
...     print(repr(piece))
' Paris'
'.'

The fields of Options and of Sampling are keywords of generate, stream and Conversation.say; None is the default:

>>> options = {"temperature": 0.8, "top_p": 0.95, "seed": 3, "max_tokens": 9}
>>> one, two = (m.generate("Tell me a joke.", system="Be brief.", **options) for _ in range(2))
>>> one.text == two.text
True

A chat keeps its cache between turns, and what has been read once need not be read again, not even tomorrow:

>>> chat = minioscar.Conversation(m, system="You are helpful.", ctx=1024)
>>> "".join(chat.say("What is the capital of France?"))
'The capital of France is Paris.'
>>> chat.last.prompt_tokens, chat.last.prefilled_tokens, len(chat.held)
(25, 25, 32)
>>> document = m.prefill("The river Seine is 777 km long. It flows through Paris into the Channel.")
>>> m.generate("How long is the Seine?", cache=document, max_tokens=40).text
'The Seine is a river with a length of 777 km.'
>>> document.save("seine.kv.safetensors")
>>> document = m.load_cache("seine.kv.safetensors")

Logits are a NumPy array, float32 [tokens, vocab], and everything that cannot work is a minioscar.UserError of one line:

>>> logits = m.logits(m.encode("The capital of France is", chat=False))
>>> logits.shape, m.tokenizer.decode([logits[-1].argmax()])
((5, 49152), ' Paris')
>>> m.generate("", max_tokens=1)
Traceback (most recent call last):
minioscar.errors.UserError: the prompt is empty; give it some text
>>> m.generate("The capital of France is", temprature=0.7)
Traceback (most recent call last):
minioscar.errors.UserError: there is no option 'temprature'; did you mean temperature or template?
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .answers import Generation as Generation
    from .answers import Logprob as Logprob
    from .app.conversation import Conversation as Conversation
    from .engine import Engine as Engine
    from .engine import load as load
    from .errors import Failure as Failure
    from .errors import UserError as UserError
    from .options import Options as Options
    from .oscar import SCHEMES as SCHEMES
    from .prompt_cache import PromptCache as PromptCache
    from .sampling import Sampling as Sampling

_FROM = {
    "load": "engine", "Engine": "engine", "Conversation": "app.conversation", "PromptCache": "prompt_cache",
    "Generation": "answers", "Logprob": "answers", "Options": "options", "Sampling": "sampling",
    "SCHEMES": "oscar",
    "UserError": "errors", "Failure": "errors",
}  # fmt: skip
__all__ = ["__version__", *_FROM]


def __getattr__(name: str) -> Any:
    """Imported when it is asked for, so that `import minioscar` and --help cost nothing."""
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(".evaluation.baselines", __name__)  # their schemes are as good a `kv` as any
    return getattr(import_module(f".{_FROM[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
