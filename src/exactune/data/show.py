"""Rows as the model will see them, coloured: learned text, masked text, control tokens. For the terminal (rich) and as HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

Spans = Sequence[tuple[str, bool]]
LEARNED, MASKED, CONTROL = "bold green", "dim", "magenta"

_PAGE = """<!doctype html><meta charset="utf-8"><title>What is learned</title>
<style>
body {{ font: 14px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #ccc; border-radius: 6px; padding: 1rem; }}
.learned {{ background: #d3f3d9; color: #063; }} .masked {{ color: #777; }} .control {{ color: #a0a; }}
</style>
<p><span class="learned">learned</span>, <span class="masked">read, not learned</span>, <span class="control">control tokens</span></p>
{rows}
"""


def control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """A pattern of every added token of `tokenizer`."""
    tokens = sorted((str(token) for token in tokenizer.get_added_vocab()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def coloured(spans: Spans, control: re.Pattern[str] | None = None) -> Text:
    """One row for a rich console."""
    from rich.text import Text

    text = Text()
    for part, learned in spans:
        text.append(part, style=LEARNED if learned else MASKED)
    if control is not None:
        text.highlight_regex(control, CONTROL)
    return text


def page(rows: Sequence[Spans], control: re.Pattern[str] | None = None) -> str:
    """A page of rows as HTML, complete in itself."""
    return _PAGE.format(rows="\n".join(f"<pre>{_row(spans, control)}</pre>" for spans in rows))


def _row(spans: Spans, control: re.Pattern[str] | None) -> str:
    parts = []
    for text, learned in spans:
        body, at = [], 0
        for match in control.finditer(text) if control is not None else ():
            body += [html.escape(text[at : match.start()]), f'<span class="control">{html.escape(match.group())}</span>']
            at = match.end()
        body.append(html.escape(text[at:]))
        parts.append(f'<span class="{"learned" if learned else "masked"}">{"".join(body)}</span>')
    return "".join(parts)
