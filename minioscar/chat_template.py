"""Messages -> the text of a prompt, by the model's chat template: a jinja2 program, run in a sandbox as transformers
runs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from .errors import ChatTemplateError, UserError, one_line, shown
from .storage import foreign
from .storage import strict_json as json
from .storage.files import decoded
from .towers.media import PARTS

MAX_CHAT = 64 << 20  # characters a chat template may write: far above any context, far below memory
MAX_SECONDS = 5.0  # that a chat template may loop
Message = Mapping[str, Any]  # {"role": str, "content": str or list of parts}, and what else the template knows


def find(folder: Path, config: Mapping[str, Any], file: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name, the usual one as "default". Raises UserError for a file that is not readable.

    The later of these wins: config (tokenizer_config.json), where it may be one of several, file (chat_template.json),
    additional_chat_templates/NAME.jinja, chat_template.jinja.
    """
    named: dict[str, str] = {}
    for source in (config.get("chat_template"), file.get("chat_template")):
        if isinstance(source, list):
            source = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = source if isinstance(source, dict) else {"default": source}
        named |= {
            name: text for name, text in source.items() if isinstance(name, str) and text and isinstance(text, str)
        }
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (path := folder / "chat_template.jinja").is_file() or path.is_symlink():
        files["default"] = path
    return named | {name: _text(path) for name, path in files.items()}


def _text(path: Path) -> str:
    try:
        return decoded(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise UserError(f"{path} {foreign.GONE}") from None
    except OSError as error:
        raise UserError(f"{path}: not readable ({error}); fetch it again") from error


def malformed(messages: Any) -> str | None:
    """Why these are no messages of a chat, a list of objects {"role": text, "content": text or parts}; None if they
    are."""
    if not isinstance(messages, list | tuple) or not messages:
        return "there is no message" if isinstance(messages, list | tuple) else "it is no list"
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"messages[{i}] has no role"
        content = message.get("content")
        if isinstance(content, list | tuple):
            for part in content:
                kind = part.get("type") if isinstance(part, Mapping) else part
                if isinstance(part, Mapping) and kind in PARTS and part.get(kind) is not None:
                    continue
                if not isinstance(part, Mapping) or kind != "text":
                    known = "only parts of the types 'text', 'image', 'audio' and 'video' can be read"
                    return f"messages[{i}] has a part {str(kind)[:40]!r}; {known}"
                if not isinstance(part.get("text"), str):
                    return f'messages[{i}] has a part without its text; write {{"type": "text", "text": text}}'
        elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            return f"messages[{i}] has no content of text or parts"
    return None


def flat(content: Any) -> Any:
    """Parts as one text, as vLLM joins them; anything else, and parts that are not all text, as it is."""
    is_text = isinstance(content, list | tuple) and all(part["type"] == "text" for part in content)
    return "\n".join(part["text"] for part in content) if is_text else content


def chosen(
    folder: Path, templates: Mapping[str, str], messages: Sequence[Message], variables: Mapping[str, Any],
    extra: dict[str, Any],
) -> str:
    """`Tokenizer.chat`: by the template that extra's chat_template names (the usual one), of those in the folder."""
    if not (isinstance(messages, list | tuple) and not messages) and (why := malformed(messages)):
        raise UserError(f"messages cannot be rendered: {why}")
    name = extra.pop("chat_template", "default")
    if not isinstance(name, str) or name not in templates:
        if isinstance(name, str) and name == "default":
            raise ChatTemplateError(f"{folder}: the model has no chat template")
        names = ", ".join(sorted(templates)) or "none"
        raise UserError(f"{folder}: there is no chat template {shown(name)}; it has: {names}")
    try:
        return render(templates[name], messages, variables, extra)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except Exception as error:  # a template is a program: it may end in any exception
        reason = one_line(error)
        raise ChatTemplateError(f"{folder}: the chat template failed ({reason})") from error


def render(template: str, messages: Sequence[Message], variables: Mapping[str, Any], extra: Mapping[str, Any]) -> str:
    """The text of the messages. extra: variables from the caller, such as enable_thinking.

    A template knows content as text, as parts, or both. What it does not show, or shows as Python writes it, is
    rendered in the other form: parts joined to one text, text as a list of one part. Raises UserError for a variable
    that the template does not read, else any exception: a template is a program.
    """
    compiled, names = _compiled(template)
    own = {"messages", "tools", "documents", "add_generation_prompt", *variables, *compiled.environment.globals}
    for name in extra:
        if name in own:
            raise UserError(
                f"the template argument {name!r} would overwrite what the chat template is given; leave it out"
            )
        if name not in names:
            known = ", ".join(sorted(names - own)) or "none"
            raise UserError(f"the chat template has no variable {name!r} to set; it has: {known}")

    def written(messages: Sequence[Message]) -> str:
        return _written(compiled, {"tools": None, "documents": None, **variables, **extra, "messages": messages})

    def shown(messages: Sequence[Message]) -> str | None:
        try:
            text = written(messages)
        except Exception:  # the other form has the better reason
            return None
        return text if _shows(text, messages) else None

    if any(isinstance(m.get("content"), list | tuple) for m in messages):
        text = shown(messages)
        return written([_with(m, flat) for m in messages]) if text is None else text
    text = written(messages)
    return text if _shows(text, messages) else shown([_with(m, as_parts) for m in messages]) or text


def names(template: str) -> set[str]:
    """The variables that a template reads. Raises jinja2's exceptions where it is no template."""
    return _compiled(template)[1]


def _with(message: Message, form: Callable[[Any], Any]) -> Message:
    return {**message, "content": form(message["content"])} if "content" in message else message


def as_parts(content: Any) -> Any:
    """Text as a list of one part; anything else as it is."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _shows(text: str, messages: Sequence[Message]) -> bool:
    """Whether all that was said is there (answers may be shortened: thoughts), and no part as Python writes it."""
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list | tuple) else []
        said = [part["text"] for part in as_parts(content) or [] if part["type"] == "text"]
        said = said if message["role"] != "assistant" else []
        if any(str(part) in text for part in parts) or any(words.strip() not in text for words in said):
            return False
    return True


def _written(compiled: Any, variables: Mapping[str, Any]) -> str:
    compiled.environment.deadline = time.monotonic() + MAX_SECONDS
    pieces, size = [], 0
    for piece in compiled.generate(**variables):
        size += len(piece)
        if size > MAX_CHAT:
            raise ValueError(f"it writes more than {MAX_CHAT} characters")
        pieces.append(piece)
    return "".join(pieces)


@lru_cache(maxsize=16)
def _compiled(template: str) -> tuple[Any, set[str]]:
    """The template in jinja2's sandbox, with what transformers (utils/chat_template_utils.py) gives it; the names it
    reads."""
    import jinja2
    from jinja2 import meta, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        """No single product or power is larger than what a template may write."""

        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            pairs = [
                (a, b) for a, b in ((left, right), (right, left)) if isinstance(a, str | list | tuple)
                and isinstance(b, int)
            ]
            sizes = [len(a) * b for a, b in pairs]
            if operator == "**" and isinstance(left, int) and isinstance(right, int):
                sizes = [left.bit_length() * right]
            if max(sizes, default=0) > MAX_CHAT:
                raise ValueError(f"it makes a value of more than {MAX_CHAT} characters")
            return super().call_binop(context, operator, left, right)

    class Generation(Extension):
        """{% generation %} marks an answer for training; here it is its content."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:  # jinja2's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def check_time() -> None:
        if time.monotonic() > environment.deadline:
            raise ValueError(f"it runs for more than {MAX_SECONDS:g} seconds")

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
    environment.check_time = check_time
    tree = environment.parse(template)
    names = meta.find_undeclared_variables(tree)
    for repeated in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        tick = nodes.ExprStmt(nodes.Call(nodes.EnvironmentAttribute("check_time"), [], [], None, None))
        repeated.body.insert(0, tick.set_lineno(repeated.lineno, override=True))
    return environment.from_string(tree), names
