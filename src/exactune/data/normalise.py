"""One raw row of each format -> one normalised row: {"messages"}, {"prompt", "completion"}, {"text"} (and pairs, labels).

A row that cannot be meant raises `BadRow` with the reason. Nothing is repaired here: what is read is what is said.
"""

from __future__ import annotations

import json
from typing import Any

from exactune.data.rows import BadRow

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool",
    "function_call": "function_call",
}  # fmt: skip

# columns of a row that the chat template is given besides the messages
TEMPLATE_FIELDS = ("tools", "documents", "chat_template_kwargs")


def text_field(row: dict[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    """The text in field `name`; numbers are written out. Raises `BadRow` where it is missing, empty or no text."""
    value = row.get(name)
    if value is None:
        if may_be_empty:
            return ""
        raise BadRow(*((f"`{name}` is empty", "empty_field") if name in row else (f"`{name}` is missing", "missing_field")))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise BadRow(f"`{name}` is not text but a {type(value).__name__}", "wrong_type")
    if not value.strip() and not may_be_empty:
        raise BadRow(f"`{name}` is empty", "empty_field")
    return value


def without_none(value: Any) -> Any:
    """Drop the keys that Arrow filled in with None, at every depth: templates would print them."""
    if isinstance(value, dict):
        return {key: without_none(held) for key, held in value.items() if held is not None}
    if isinstance(value, list):
        return [without_none(held) for held in value]
    return value


def _parsed(value: Any, name: str) -> Any:
    """`value`, or what it says where it is JSON in a string (as CSV and some hub sets keep lists)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise BadRow(f"`{name}` is a string that is not JSON ({error.msg})", "wrong_type") from error


def _content(value: Any, where: str) -> str | None:
    """Text of a message: a string, or the joined text parts of an OpenAI-style list."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, list):
        raise BadRow(f"the content of {where} is not text but a {type(value).__name__}", "wrong_type")
    texts = []
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type", "?") if isinstance(part, dict) else type(part).__name__
            raise BadRow(f"{where} has a part of type {kind!r}; only text can be trained on", "not_text")
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """OpenAI-style calls with `arguments` as an object: templates write the object as JSON themselves."""
    calls = []
    for call in _parsed(value, "tool_calls"):
        call = without_none(call)
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not function.get("name"):
            raise BadRow(f"a tool call of {where} names no function", "bad_tool_call")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments or "{}", "arguments")
        kept = {key: held for key, held in call.items() if key not in ("function", "name", "arguments")}
        calls.append({**kept, "type": "function", "function": {**function, "arguments": arguments}})
    return calls


def _message(raw: Any, number: int, role_key: str, content_key: str) -> dict[str, Any]:
    where = f"message {number}"
    if not isinstance(raw, dict):
        raise BadRow(f"{where} is not an object but a {type(raw).__name__}", "wrong_type")
    said = raw.get(role_key)
    role = ROLES.get(said.strip().lower()) if isinstance(said, str) else None
    if role is None:
        raise BadRow(f"{where} has the unknown role {said!r}" if said is not None else f"{where} has no `{role_key}`", "unknown_role")
    message = {key: held for key, held in raw.items() if held is not None and key not in (role_key, content_key)}
    if role == "function_call":  # ShareGPT's way to write an assistant's call
        call = _parsed(raw.get(content_key), "function_call")
        return {"role": "assistant", **message, "tool_calls": _tool_calls(call if isinstance(call, list) else [call], where)}
    content = _content(raw.get(content_key), f"{where} ({role})")
    if message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
    else:
        message.pop("tool_calls", None)
        if not (content and content.strip()) and not (role == "tool" and content is not None):
            raise BadRow(f"{where} ({role}) is empty", "empty_message")
    return {"role": role, **({} if content is None else {"content": content}), **message}


def conversation(value: Any, name: str, role_key: str = "role", content_key: str = "content") -> list[dict[str, Any]]:
    """A list of messages in the field's own standard form (role, content, tool_calls, ...)."""
    if value is None:
        raise BadRow(f"`{name}` is empty", "empty_field")
    value = _parsed(value, name)
    if not isinstance(value, list):
        raise BadRow(f"`{name}` is not a list of messages but a {type(value).__name__}", "wrong_type")
    if not value:
        raise BadRow(f"`{name}` is empty", "empty_field")
    if isinstance(value[0], dict) and role_key not in value[0] and {"role", "from"} & value[0].keys():
        role_key, content_key = ("role", "content") if "role" in value[0] else ("from", "value")
    return [_message(raw, number, role_key, content_key) for number, raw in enumerate(value, 1)]


def _held(row: dict[str, Any], name: str) -> Any:
    if name not in row:
        raise BadRow(f"`{name}` is missing", "missing_field")
    return row[name]


def _with_template_fields(row: dict[str, Any], normalised: dict[str, Any]) -> dict[str, Any]:
    for name in TEMPLATE_FIELDS:
        if row.get(name):
            normalised[name] = without_none(_parsed(row[name], name))
    return normalised


def _with_system(row: dict[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    system = row.get("system") or row.get("system_prompt")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def from_messages(row: dict[str, Any]) -> dict[str, Any]:
    """OpenAI / ChatML `messages` with role and content."""
    return _with_template_fields(row, {"messages": _with_system(row, conversation(_held(row, "messages"), "messages"))})


def from_sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    """ShareGPT `conversations` with from and value."""
    name = "conversation" if "conversation" in row else "conversations"
    return _with_template_fields(row, {"messages": _with_system(row, conversation(_held(row, name), name, "from", "value"))})


def from_instruction(row: dict[str, Any], question: str, context: str | None, answer: str) -> dict[str, Any]:
    """One exchange: the instruction, with the input under it where there is one, and the answer."""
    asked, extra = text_field(row, question), text_field(row, context, may_be_empty=True) if context else ""
    messages = [
        {"role": "user", "content": f"{asked}\n\n{extra}" if extra.strip() else asked},
        {"role": "assistant", "content": text_field(row, answer)},
    ]
    return {"messages": _with_system(row, messages)}


def from_prompt_completion(row: dict[str, Any]) -> dict[str, Any]:
    """`prompt` and `completion`: both text, or both lists of messages."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, str) and completion.strip():
        completion = [{"role": "assistant", "content": completion}]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _with_template_fields(row, {"prompt": conversation(prompt, "prompt"), "completion": conversation(completion, "completion")})
    return {"prompt": text_field(row, "prompt"), "completion": text_field(row, "completion")}


def from_text(row: dict[str, Any]) -> dict[str, Any]:
    """Plain text."""
    return {"text": text_field(row, "text")}


def _side(row: dict[str, Any], name: str) -> Any:
    return conversation(row[name], name) if isinstance(row.get(name), list) else text_field(row, name)


def from_preference(row: dict[str, Any]) -> dict[str, Any]:
    """A chosen and a rejected answer, with an explicit prompt or one that both begin with."""
    pair = {name: _side(row, name) for name in ("prompt", "chosen", "rejected") if name != "prompt" or row.get("prompt") is not None}
    if pair["chosen"] == pair["rejected"]:
        raise BadRow("`chosen` and `rejected` are the same", "same_pair")
    return _with_template_fields(row, pair)


def from_kto(row: dict[str, Any]) -> dict[str, Any]:
    """A prompt, a completion, and whether it was good."""
    label = row.get("label")
    if label not in (True, False, "true", "false", "True", "False"):
        raise BadRow(f"`label` has to be true or false, not {label!r}", "bad_label")
    return {**from_prompt_completion(row), "label": label in (True, "true", "True")}
