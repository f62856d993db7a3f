"""A run's report: what it gained, on what, with which settings, and how to use the result; Markdown, and the same as one HTML file."""

from __future__ import annotations

import base64
import dataclasses
import html
from dataclasses import dataclass
from typing import Any

import yaml

from exactune.evaluate import Sample
from exactune.train.config import TrainConfig
from exactune.train.scores import Scored, before_and_after

SAMPLES = 6
SAMPLE_CHARACTERS = 600

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ border: 1px solid #d5dae0; padding: .35rem .6rem; text-align: left; vertical-align: top; }}
code, pre {{ font: 13px/1.45 ui-monospace, monospace; background: #f4f6f8; }} pre {{ padding: .7rem; overflow-x: auto; }}
td code {{ white-space: pre-wrap; overflow-wrap: anywhere; }} img {{ max-width: 100%; }}
</style></head><body>
{body}</body></html>
"""


@dataclass(frozen=True)
class Facts:
    """What a report tells. `data` and `environment` are the contents of the JSON files of those names."""

    run: str
    config: TrainConfig
    environment: dict[str, Any]
    data: dict[str, Any]
    result: dict[str, str]
    before: Scored | None
    after: Scored | None
    has_plot: bool
    answers: bool = True  # whether the result is a model to talk to


def markdown(facts: Facts) -> str:
    """The report as Markdown."""
    parts = [
        f"# {facts.config.objective} ({facts.config.method}) of {facts.config.model_name}",
        _table(("", ""), list(facts.result.items())),
    ]
    if facts.before and facts.after:
        parts += ["## Before and after", _table(("held-out rows", "before", "after"), before_and_after(facts.before, facts.after))]
    else:
        parts.append("No rows were held out: give `eval_dataset` or `val_size` to see what training gained.")
    if facts.has_plot:
        parts += ["## Loss", "![Training loss](loss.png)"]
    if facts.before and facts.after and facts.after.samples:
        parts += ["## Answers to held-out rows", *_samples(facts.before.samples, facts.after.samples)]
    parts += ["## Use it", _usage(facts), "## Data", _table(("", ""), _flat(facts.data))]
    parts += ["## Settings", _fence(facts.config.to_yaml(), "yaml")]
    parts += ["## Machine and versions", _fence(yaml.safe_dump(facts.environment, sort_keys=False), "yaml")]
    return "\n\n".join(parts) + "\n"


def page(text: str, title: str, png: bytes | None) -> str:
    """The Markdown report as one HTML file with the plot inside, to send to somebody."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    if png is not None:
        body = body.replace('src="loss.png"', f'src="data:image/png;base64,{base64.b64encode(png).decode()}"')
    return _PAGE.format(title=html.escape(title), body=body)


def card(facts: Facts) -> str:
    """README.md of the result: the header that the hub reads, and the report without its pictures."""
    adapter = facts.config.method != "full"
    header: dict[str, Any] = {"base_model": facts.config.model_name, "library_name": "peft" if adapter else "transformers"}
    task = "text-generation" if facts.answers else "text-classification"
    header |= {"pipeline_tag": task, "tags": ["exactune", facts.config.objective, facts.config.method]}
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n{markdown(dataclasses.replace(facts, has_plot=False))}"


def _usage(facts: Facts) -> str:
    if not facts.answers:
        return _reward_usage(facts)
    code = (
        "from exactune import FastLanguageModel\n\n"
        f'model, tokenizer = FastLanguageModel.from_pretrained("{facts.result["result"]}", load_in_4bit={facts.config.load_in_4bit})\n'
        "FastLanguageModel.for_inference(model)"
    )
    commands = f"exactune chat {facts.run}\nexactune merge {facts.run}"
    return f"{_fence(commands, 'sh')}\n\n{_fence(code, 'python')}"


def _reward_usage(facts: Facts) -> str:
    """A reward model is asked for one number a text."""
    base, result = facts.config.model_name, facts.result["result"]
    whole = facts.config.method == "full"
    adapter = "" if whole else f'\nmodel = PeftModel.from_pretrained(model, "{result}")'
    code = (
        f"{'' if whole else 'from peft import PeftModel' + chr(10)}from transformers import AutoModelForSequenceClassification\n\n"
        f'model = AutoModelForSequenceClassification.from_pretrained("{result if whole else base}", num_labels=1){adapter}'
    )
    return _fence(code, "python")


def _samples(before: list[Sample], after: list[Sample]) -> list[str]:
    parts = []
    for old, new in list(zip(before, after))[:SAMPLES]:
        rows = [(_cell(new.reference), _cell(old.answer), _cell(new.answer))]
        verdict = ("wrong", "right")
        header = ("reference", f"before ({verdict[old.right]})", f"after ({verdict[new.right]})")
        parts += [_fence(new.prompt[:SAMPLE_CHARACTERS]), _table(header, rows)]
    return parts


def _cell(text: str) -> str:
    """Any text as code inside a table's cell: one line, its bars and backticks kept from ending it."""
    flat = " ↵ ".join((text[:SAMPLE_CHARACTERS] + ("…" if len(text) > SAMPLE_CHARACTERS else "")).split("\n")).strip()
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in flat).split()), default=0)
    ticks = "`" * (longest + 1)
    return f"{ticks} {flat} {ticks}" if flat else "(nothing)"


def _fence(text: str, language: str = "") -> str:
    longest = max((len(line) - len(line.lstrip("`")) for line in text.splitlines()), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def _table(header: tuple[str, ...], rows: list[Any]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _flat(values: dict[str, Any], under: str = "") -> list[tuple[str, str]]:
    """Nested facts as one row each: `train.rows`, `held_out.rows`, ..."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{under}{key}"
        if isinstance(value, dict):
            rows += _flat(value, f"{name}.")
        elif isinstance(value, list):
            rows.append((name, str(len(value))))
        elif value is not None:
            rows.append((name, str(value)))
    return rows
