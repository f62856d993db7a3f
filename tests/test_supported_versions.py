"""What `make test-oldest` installs is the lower end of what pyproject.toml allows."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_oldest_versions_are_the_lower_bounds():
    bounds = dict(re.findall(r'"(\w+)>=([\d.]+),<[\d.]+"', (ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    oldest = dict(line.split("==") for line in (ROOT / "scripts/oldest.txt").read_text(encoding="utf-8").split())
    assert oldest == {name: f"{bounds[name]}.0" for name in ("transformers", "trl", "peft")}
