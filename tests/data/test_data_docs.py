"""The examples of docs/data.md run: those in Python in order, as one script; the commands on a few rows and the bundled model."""

import re
import runpy
import shlex
from pathlib import Path

from typer.testing import CliRunner

from exactune import assets
from exactune.cli.main import app

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_examples_run(tmp_path, capsys):
    found = blocks("python")
    assert len(found) >= 9
    script = tmp_path / "examples.py"
    script.write_text("\n".join(found), encoding="utf-8")
    runpy.run_path(str(script))
    assert "LEARNED" in capsys.readouterr().out


def test_the_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, split, count in (("train", "train", 40), ("test", "held_out", 10)):
        lines = assets.dataset(split).read_text(encoding="utf-8").splitlines()[:count]
        Path(f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    Path("docs").mkdir()
    Path("docs/page.md").write_text("# Rivers\n\n" + "A river flows from its source to the sea. " * 20)
    shown = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("exactune ")]
    said = {}
    for line in shown:
        words = shlex.split(line.replace("MODEL", str(assets.base_model())))[1:]
        if "generate" in words and "--dry-run" not in words:
            continue  # the same command, which asks a server: tests/data/test_data_generate.py runs one
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (line, result.output)
        said[words[1]] = result.output
    assert said.keys() == {"check", "clean", "generate"}
    assert "40 rows" in said["check"] and "request" in said["generate"] and len(Path("clean.jsonl").read_text().splitlines()) == 40
