"""What the README and the pages on the command line show is what the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from exactune.cli.main import app
from exactune.train import TrainConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("cli", "quickstart", "data", "methods", "export", "memory"))]


def shown_commands() -> list[str]:
    """Every `exactune …` line in the shell blocks of the pages, and what `make quickstart` hands on."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            found += re.findall(r"(?:^|\| )(exactune .*)$", block, re.MULTILINE)
            found += [f"exactune quickstart {arguments}" for arguments in re.findall(r'make quickstart ARGS="(.*?)"', block)]
    return found


@pytest.mark.parametrize("line", shown_commands())
def test_every_shown_command_exists_with_its_options(line):
    words = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app)
    context = command.make_context("exactune", ["doctor"], resilient_parsing=True)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.get_params(context) for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known


def test_enough_commands_are_shown():
    assert len(shown_commands()) > 12


def test_the_tables_list_the_options_that_the_commands_have():
    from cli_options import BEGIN, END, PAGE, options

    def listed(text):
        """Headings and names; how the commands word a meaning may have been polished since."""
        return [line.split("` | ")[0] for line in text.splitlines() if line.startswith(("### ", "| `"))]

    assert "### exactune export" in listed(options()) and "| `--imatrix FILE\\|train" in listed(options())
    shown = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    assert listed(shown) == listed(options()), "docs/cli.md is out of date: run `python scripts/cli_options.py`"


def test_the_shown_config_is_valid():
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), re.DOTALL)
    assert TrainConfig(**yaml.safe_load(block)).method == "qlora"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
