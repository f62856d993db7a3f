"""The command starts in an instant, because it loads nothing heavy before a command needs it."""

from __future__ import annotations

import resource
import subprocess
import sys

HELP = "import sys; sys.argv = ['exactune', *{args!r}]\nfrom exactune.cli.main import main\ntry:\n    main()\nexcept SystemExit: pass\n"


def modules_after(*args: str) -> set[str]:
    code = HELP.format(args=list(args)) + "print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage")
    return set(done.stderr.split())


def test_help_loads_nothing_heavy():
    loaded = modules_after("--help")
    assert not loaded & {"torch", "transformers", "peft", "trl", "datasets", "pydantic", "yaml", "numpy", "rich"}


def test_help_of_train_loads_only_what_names_the_fields():
    loaded = modules_after("train", "--help")
    assert "pydantic" in loaded
    assert not loaded & {"torch", "transformers", "peft", "trl", "datasets"}


def test_help_is_there_in_a_third_of_a_second():
    """Processor time, the best of seven starts: what the command costs, whatever else the machine is doing."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "exactune", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(once() for _ in range(7)) <= 0.3


def test_every_command_is_listed():
    listed = subprocess.run([sys.executable, "-m", "exactune", "--help"], capture_output=True, text=True, check=True).stdout
    for command in ("quickstart", "train", "chat", "generate", "merge", "doctor"):
        assert f"\n  {command} " in listed
    assert "--debug" in listed
