"""`exactune generate RUN_OR_MODEL`: answers to prompts from the command line or from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from exactune.errors import ConfigError, OutputError


def generate(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="Run folder, model folder or hub name.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    file: Annotated[Path | None, typer.Option(help="Prompts: a text file (one a line), or JSONL, CSV, … rows.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write JSONL here instead of printing.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file if there is one.")] = False,
    system: Annotated[str | None, typer.Option(help="System message for every prompt.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it stands, without the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Prompts answered at once.")] = 8,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time; higher is more varied.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens that add up to this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    load_in_4bit: Annotated[bool | None, typer.Option(help="Load the base in 4 bits (NF4); left out, as the run was trained.")] = None,
) -> None:
    """Answer one prompt, or many from a file.

    One answer is printed as it is, several as JSON lines with prompt and answer.
    """
    from exactune.cli.prompts import read_prompts

    prompts: list[Any] = [*(prompt or []), *(read_prompts(file) if file else [])]
    if not prompts:
        raise ConfigError("There is no prompt.", "Give --prompt TEXT or --file FILE.")
    if output and output.exists() and not overwrite:
        raise OutputError(f"{output} exists.", "Choose another --output, or replace it with --overwrite.")

    from exactune.cli.opening import open_model
    from exactune.infer import generate as answer
    from exactune.train.quiet import quiet

    with quiet():
        model, tokenizer = open_model(target, load_in_4bit=load_in_4bit)
        if not raw and not tokenizer.chat_template:
            typer.echo(f"{target} has no chat template: the text is continued as it stands.", err=True)
            raw = True
        conversations = [_as_conversation(item, system, raw) for item in prompts]
        sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
        answers = answer(model, tokenizer, conversations, max_new_tokens=max_new_tokens, batch_size=batch_size, **sampling)
    lines = [json.dumps({"prompt": item, "answer": text}, ensure_ascii=False) for item, text in zip(prompts, answers, strict=True)]
    if output:
        from exactune.train.writing import write_atomically

        write_atomically(output, "".join(f"{line}\n" for line in lines).encode())
    else:
        typer.echo(answers[0] if len(answers) == 1 and not file else "\n".join(lines))


def _as_conversation(prompt: Any, system: str | None, raw: bool) -> Any:
    """Messages to answer, or with `raw` the bare text."""
    if raw:
        if not isinstance(prompt, str):
            raise ConfigError("Messages cannot be continued as plain text.", "Leave --raw out, or give prompts as text.")
        return prompt
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return [{"role": "system", "content": system}, *messages] if system else messages
