"""`exactune chat RUN_OR_MODEL`: a conversation in the terminal, streamed, with the model's own chat template."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer."


def chat(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="Run folder, model folder or hub name.")],
    system: Annotated[str | None, typer.Option(help="System message to begin with.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time; higher is more varied.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens that add up to this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    load_in_4bit: Annotated[bool | None, typer.Option(help="Load the base in 4 bits (NF4); left out, as the run was trained.")] = None,
) -> None:
    """Talk to a trained run or to any model. Questions may also be piped in, one a line."""
    from exactune.cli.opening import open_model
    from exactune.errors import ModelError
    from exactune.train.quiet import quiet

    with quiet():
        model, tokenizer = open_model(target, load_in_4bit=load_in_4bit)
        if not tokenizer.chat_template:
            raise ModelError(
                f"{target} has no chat template, so it cannot hold a conversation.",
                f"Continue plain text instead: exactune generate {target} --prompt '…'",
            )
        talk = Talk(model, tokenizer, system, {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}, seed)
        if sys.stdin.isatty():
            typer.echo(HELP, err=True)
        _converse(talk)


@dataclass
class Talk:
    """A conversation so far, and how it is answered."""

    model: Any
    tokenizer: Any
    system: str | None
    sampling: dict[str, Any]
    seed: int
    turns: list[dict[str, str]] = field(default_factory=list)

    def answer(self, question: str) -> None:
        """Print the answer as it comes and remember both; a stopped answer is remembered as far as it got."""
        from exactune.infer import stream

        self.turns.append({"role": "user", "content": question})
        self._make_room()
        said: list[str] = []
        pieces = stream(self.model, self.tokenizer, self._messages(), **self.sampling, seed=self.seed + len(self.turns))
        try:
            with closing(pieces):
                for piece in pieces:
                    said.append(piece)
                    typer.echo(piece, nl=False)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
        typer.echo()
        self.turns.append({"role": "assistant", "content": "".join(said)})

    def _messages(self) -> list[dict[str, str]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def _make_room(self) -> None:
        """Forget the oldest exchanges when the conversation and an answer no longer fit the model's context."""
        from exactune.infer.prompt import encode

        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is None:
            return
        room = context - min(self.sampling["max_new_tokens"], context // 2)
        forgotten = 0
        while len(self.turns) > 2 and len(encode(self.tokenizer, self._messages())) > room:
            del self.turns[:2]
            forgotten += 1
        if forgotten:
            typer.echo(f"(the model's context of {context} tokens is full: the oldest exchanges forgotten: {forgotten})", err=True)


def _converse(talk: Talk) -> None:
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 -- gives input() line editing and history
    while True:
        try:
            question = input("> " if interactive else "").strip()
        except EOFError:
            return
        if question in ("/exit", "/quit"):
            return
        if question == "/reset":
            talk.turns.clear()
            typer.echo("(conversation forgotten)", err=True)
        elif question.startswith("/help"):
            typer.echo(HELP, err=True)
        elif question:
            talk.answer(question)
