"""Ollama's Modelfile: the file, its template in Ollama's own language, its stop tokens and sampling parameters.

Ollama renders with Go templates, not Jinja. The Go template is read off the model's own renderings (what stands before and after each
role's content), and kept only if, applied by hand, it gives every conversation of the guard that it can express.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exactune.export.gguf.vocabulary import stop_ids
from exactune.export.template_guard import CONVERSATIONS, has_template, render

_ROLES = ("system", "user", "assistant")
_MARKS = {"system": "\u27e6S\u27e7", "user": "\u27e6U\u27e7", "assistant": "\u27e6A\u27e7"}


def modelfile(gguf_name: str, tokenizer: Any, generation: Any, adds_bos: bool) -> str:
    """The text of a Modelfile for `gguf_name` in the same folder."""
    lines = [f"FROM ./{gguf_name}", ""]
    pieces = _pieces(tokenizer) if has_template(tokenizer) else None
    if pieces is not None:
        lines += [f'TEMPLATE """{_go_template(pieces, tokenizer.bos_token if adds_bos else "")}"""', ""]
    elif has_template(tokenizer):
        lines += ["# The chat template says more than Ollama's template language was shown to; Ollama reads the one in the file.", ""]
    lines += [f"PARAMETER stop {_quoted(tokenizer.convert_ids_to_tokens(index))}" for index in stop_ids(generation, tokenizer)]
    if getattr(generation, "do_sample", False):
        for name, key in (("temperature", "temperature"), ("top_p", "top_p"), ("top_k", "top_k"), ("repetition_penalty", "repeat_penalty")):
            if (value := getattr(generation, name, None)) is not None:
                lines.append(f"PARAMETER {key} {value}")
    return "\n".join(lines) + "\n"


def write_modelfile(folder: Path, gguf_name: str, tokenizer: Any, generation: Any, adds_bos: bool) -> Path:
    path = folder / "Modelfile"
    path.write_text(modelfile(gguf_name, tokenizer, generation, adds_bos), encoding="utf-8")
    return path


def _pieces(tokenizer: Any) -> dict[str, str] | None:
    """Opening, what stands before and after each role's content, and the generation prompt; None if the template is not of that kind."""
    user, assistant = ({"role": role, "content": _MARKS[role]} for role in ("user", "assistant"))
    one = render(tokenizer, [user], None, False)
    two = render(tokenizer, [user, assistant], None, False)
    three = render(tokenizer, [user, assistant, user], None, False)
    prompt = render(tokenizer, [user], None, True)
    if not (two.startswith(one) and three.startswith(two) and prompt.startswith(one)):
        return None
    before_user, _, after_user = three[len(two) :].partition(_MARKS["user"])
    before_assistant, _, after_assistant = two[len(one) :].partition(_MARKS["assistant"])
    block = before_user + _MARKS["user"] + after_user
    if not one.endswith(block):
        return None
    pieces = {
        "open": one[: len(one) - len(block)],
        "before_user": before_user, "after_user": after_user,
        "before_assistant": before_assistant, "after_assistant": after_assistant,
        "prompt": prompt[len(one) :],
    }  # fmt: skip
    with_system = render(tokenizer, [{"role": "system", "content": _MARKS["system"]}, user], None, False)
    if with_system.startswith(pieces["open"]) and with_system.endswith(block) and _MARKS["system"] in with_system:
        middle = with_system[len(pieces["open"]) : len(with_system) - len(block)]
        pieces["before_system"], _, pieces["after_system"] = middle.partition(_MARKS["system"])
    return pieces if _explains(pieces, tokenizer) else None


def _explains(pieces: dict[str, str], tokenizer: Any) -> bool:
    """The pieces give every conversation without tools that the template renders."""
    for messages, tools, add_prompt in CONVERSATIONS.values():
        wanted = render(tokenizer, messages, tools, add_prompt)
        if tools or wanted.startswith("<the template refuses") or any(f"before_{m['role']}" not in pieces for m in messages):
            continue
        body = "".join(pieces[f"before_{m['role']}"] + m["content"] + pieces[f"after_{m['role']}"] for m in messages)
        if pieces["open"] + body + (pieces["prompt"] if add_prompt else "") != wanted:
            return False
    return True


def _go_template(pieces: dict[str, str], bos_of_engine: str) -> str:
    """`bos_of_engine`: a BOS that llama.cpp puts before the prompt by itself and that must not stand there twice."""
    text = _escaped(pieces["open"].removeprefix(bos_of_engine or ""))
    text += "{{ range .Messages }}"
    word = "if"
    for role in _ROLES:
        if f"before_{role}" in pieces:
            before, after = _escaped(pieces[f"before_{role}"]), _escaped(pieces[f"after_{role}"])
            text += f'{{{{ {word} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            word = "else if"
    return text + "{{ end }}{{ end }}" + _escaped(pieces["prompt"])


def _escaped(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
