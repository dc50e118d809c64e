"""The messages and tools of a chat request, as chat templates know them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from .. import chat_template
from ..errors import shown
from ..storage import strict_json as json
from ..tokenizer import Tokenizer
from ..towers.media import PARTS, hidden, media_of
from . import fields
from .errors import ApiError, of_field, wrong

MAX_TOOLS = 128
NAMES = {"image": "picture", "video": "video"}  # for messages to people
TAUGHT = (
    "You may call these functions to answer. Each line describes one, in JSON:\n{tools}\n"
    'To call one, write {{"name": its name, "arguments": its arguments}} in JSON between <tool_call> and </tool_call>.'
)


@dataclass(frozen=True)
class Tool:
    name: str
    parameters: dict[str, Any]


def messages_of(body: fields.Body, images: Path | None = None) -> list[dict[str, Any]]:
    """images: the folder whose files may be named. Raises ApiError for what are no messages."""
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise wrong("messages", "messages must be a list of messages, and not empty")
    messages = [_message(i, message) for i, message in enumerate(given)]
    for message in messages:
        if isinstance(message.get("content"), list):
            message["content"] = [_part(part, images) for part in message["content"]]
    if why := chat_template.malformed(messages):
        raise wrong("messages", f"messages cannot be read: {why}")
    return messages


def _message(i: int, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise wrong("messages", f"messages[{i}] must be an object with a role")
    message = {name: value for name, value in given.items() if value is not None}
    if message["role"] == "developer":
        message["role"] = "system"
    if "content" not in message and message["role"] in ("assistant", "tool"):
        message["content"] = ""  # an answer of tool calls or thoughts alone
    thoughts = message.pop("reasoning", message.get("reasoning_content"))
    if isinstance(thoughts, str):
        message["reasoning_content"] = thoughts
    if message.pop("tool_calls", None):
        message["tool_calls"] = [_call(i, call) for call in _list(given["tool_calls"], f"messages[{i}].tool_calls")]
    return message


def _part(part: Any, images: Path | None) -> Any:
    """A picture or a video comes as a data: URL, or as the URL of a file in the folder `images`, a sound in base64;
    nothing else is opened."""
    given_as = part.get("type") if isinstance(part, dict) else None
    kind = PARTS.get(given_as) if isinstance(given_as, str) else None
    if kind is None:
        return part
    if kind == "audio":
        data = part.get("input_audio")
        if not isinstance(data, dict) or not isinstance(data.get("data"), str):
            raise wrong("messages", 'a sound must be {"type": "input_audio", "input_audio": {"data": base64}}')
        return {"type": "audio", "audio": data}
    name, field = NAMES[kind], f"{kind}_url"
    given = part.get(field) if given_as == field else None
    url = given.get("url") if isinstance(given, dict) else given
    if not isinstance(url, str):
        raise wrong("messages", f'a {name} must be {{"type": "{field}", "{field}": {{"url": "data:..."}}}}')
    rest = {"fps": part["fps"]} if kind == "video" and part.get("fps") is not None else {}
    if url.startswith("data:"):
        return {"type": kind, kind: url} | rest
    if not url.startswith("file://") or images is None:
        way_out = "send a data: URL" if images is None else f"send a data: URL or a file:// URL under {images}"
        raise wrong("messages", f"the {name} {shown(url)} is not fetched; {way_out}")
    try:
        path = Path(unquote(url.removeprefix("file://"))).resolve()
        is_there = path.is_relative_to(images.resolve()) and path.is_file()
    except (OSError, ValueError, RuntimeError):
        is_there = False
    if not is_there:
        raise wrong("messages", f"the {name} {shown(url)} is no file under {images}; send a data: URL")
    return {"type": kind, kind: str(path)} | rest


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise wrong("messages", f"{name} must be a list")
    return value


def _call(i: int, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong("messages", f"messages[{i}].tool_calls has an entry without a function's name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:  # templates write them as JSON themselves
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            pass  # what a model wrote wrongly stays as it wrote it
    function = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    return {"id": call.get("id") or "", "type": "function", "function": function}


def tools_of(body: fields.Body) -> list[dict[str, Any]]:
    """In OpenAI's form, without what is null. Raises ApiError for what are no tools."""
    tools = []
    for i, tool in enumerate(fields.items(body, "tools", MAX_TOOLS)):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise wrong("tools", f'tools[{i}] must be {{"type": "function", "function": {{"name": ...}}}}')
        if tool.get("type", "function") != "function":
            raise wrong("tools", f"tools[{i}] has the type {shown(tool['type'])}; only functions can be called")
        if not isinstance(function.get("parameters") or {}, dict):
            raise wrong("tools", f"tools[{i}] has parameters that are no JSON schema")
        function = {name: value for name, value in function.items() if value is not None and name != "strict"}
        tools.append({"type": "function", "function": {"description": "", "parameters": {}, **function}})
    return tools


def choice_of(body: fields.Body, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[Tool]]:
    """tool_choice ("none", "auto" or "required") and the tools that it leaves. Raises ApiError."""
    choice = body.get("tool_choice")
    known = [Tool(tool["function"]["name"], tool["function"]["parameters"]) for tool in tools]
    if isinstance(choice, dict):
        name = (choice.get("function") or {}).get("name") if isinstance(choice.get("function") or {}, dict) else None
        named = [tool for tool in known if tool.name == name]
        if not named:
            raise wrong("tool_choice", f"tool_choice names {shown(name)}, which is none of the tools")
        return "required", named[:1]
    if choice not in (None, "none", "auto", "required"):
        raise wrong("tool_choice", f'tool_choice {shown(choice)} must be "none", "auto", "required" or a function')
    if choice == "required" and not known:
        raise wrong("tool_choice", "tool_choice is required, but there are no tools")
    return choice if choice and known else "auto" if known else "none", known


def form_of(template: str) -> str:
    """How a model that has this template writes a call: "llama3", {"name", "parameters"} as the whole answer, or
    "hermes", {"name", "arguments"} between <tool_call> and </tool_call>."""
    is_llama = "<tool_call>" not in template and '"parameters"' in template and "ipython" in template
    return "llama3" if is_llama else "hermes"


def end_of(body: fields.Body) -> str:
    """How the prompt ends, as vLLM's API has it: "answer", with the beginning of an answer; "message", with the end of
    the last message; "continue", within it, so that the answer goes on with it. Raises ApiError."""
    goes_on = fields.switch(body, "continue_final_message")
    begins = fields.switch(body, "add_generation_prompt", not goes_on)
    if goes_on and begins:
        reason = "cannot be, with add_generation_prompt: an answer either begins or goes on; leave one of them out"
        raise wrong("continue_final_message", f"continue_final_message {reason}")
    return "continue" if goes_on else "answer" if begins else "message"


def rendered(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any], end: str = "answer",
) -> str:
    """The prompt. end: as `end_of` has it. Raises ApiError, with the template's own words, where it refuses the
    messages."""
    if not tokenizer.has_chat_template:
        raise ApiError(400, "this model has no chat template; use /v1/completions")
    if "chat_template" in variables:
        raise wrong("chat_template_kwargs", "a request cannot bring a chat template of its own; leave it out")
    if tools and not reads(tokenizer, "tools"):
        messages, tools = taught(messages, tools), ()
    with of_field("messages"):
        messages = hidden(messages)
        text = tokenizer.chat(messages, end == "answer", template=variables, tools=tools or None)
    return up_to_last(text, messages) if end == "continue" else text


def up_to_last(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """A prompt as far as the content of its last message goes. Raises ApiError where that is not shown."""
    content = chat_template.flat(messages[-1].get("content"))
    for said in (content, content.strip()) if isinstance(content, str) and content.strip() else ():
        if (at := text.rfind(said)) >= 0:
            return text[: at + len(said)]
    raise wrong("continue_final_message", "the last message has no text that the chat template shows; give it some")


def reads(tokenizer: Tokenizer, name: str) -> bool:
    """Whether the chat template has a variable of this name."""
    try:
        return name in chat_template.names(tokenizer.template)
    except Exception:  # a template is a program; what is wrong with it is said where it is rendered
        return False


def taught(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For a template that knows no tools: they, calls and results as text, in the manner of Hermes."""
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    if media_of(messages):
        raise wrong("tools", "this model's chat template knows no tools, and media cannot be told beside them")
    told, system = TAUGHT.format(tools=lines), messages[0] if messages[0]["role"] == "system" else None
    before = f"{chat_template.flat(system['content'])}\n\n" if system else ""
    found = [{"role": "system", "content": before + told}]
    for message in messages[1 if system else 0 :]:
        content = chat_template.flat(message.get("content")) or ""
        if message["role"] == "tool":
            found.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
            continue
        for call in message.get("tool_calls", ()):
            content += f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        found.append({"role": message["role"], "content": content})
    return found
