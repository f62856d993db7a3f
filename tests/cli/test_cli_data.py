"""`exactune data check` and `clean` as a user and as CI call them."""

import json

import pytest
from typer.testing import CliRunner

from exactune import assets
from exactune.cli.data import data
from exactune.errors import ConfigError

GOOD = [{"instruction": f"Say {word}", "response": f"{word} it is"} for word in ("river", "stone", "window")]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GOOD))
    return path


def run(*arguments):
    result = CliRunner().invoke(data, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_check_says_all_is_well_and_shows_rows(rows, tmp_path):
    page = tmp_path / "rows.html"
    result = run("check", rows, "--model", assets.base_model(), "--max-length", 128, "--html", page)
    assert result.exit_code == 0
    assert "Nothing is wrong" in result.output
    assert "river it is<|im_end|>" in result.output
    assert '<span class="learned">river it is<span class="control">&lt;|im_end|&gt;</span></span>' in page.read_text()


def test_check_fails_for_ci_and_prints_json(rows):
    rows.write_text(rows.read_text() + "not json\n" + json.dumps(GOOD[0]) + "\n")
    assert run("check", rows).exit_code == 1
    report = json.loads(run("check", rows, "--json").output)
    assert report["ok"] is False
    assert {finding["kind"]: finding["count"] for finding in report["findings"]} == {"unreadable_row": 1, "duplicate": 1}
    assert report["findings"][0]["places"] == ["line 4: not JSON (Expecting value): 'not json'"]


def test_warnings_fail_only_when_strict(rows):
    rows.write_text(rows.read_text() + json.dumps(GOOD[0]) + "\n")
    assert run("check", rows).exit_code == 0
    assert run("check", rows, "--strict").exit_code == 1


def test_clean_writes_rows_and_log(rows, tmp_path):
    rows.write_text(rows.read_text() + json.dumps(GOOD[0]) + "\n")
    out = tmp_path / "clean.jsonl"
    result = run("clean", rows, "--to", out)
    assert "3 of 4 rows written" in result.output
    assert [json.loads(line) for line in out.read_text().splitlines()] == GOOD
    assert json.loads((tmp_path / "clean.log.jsonl").read_text())["row"] == 4


def test_a_wrong_flag_is_the_users_mistake(rows):
    with pytest.raises(ConfigError, match="--train-on"):
        run("check", rows, "--train-on", "sometimes")
