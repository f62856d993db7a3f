"""Turns pydantic's findings into one `ConfigError` that names each field, what it expects and, for a misspelt one, the nearest name."""

from __future__ import annotations

import difflib

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from exactune.errors import ConfigError


def nearest(name: str, names: list[str]) -> str | None:
    """The valid name that `name` most likely means; None where nothing is near."""
    matches = difflib.get_close_matches(name.replace("-", "_").lower(), names, n=1, cutoff=0.5)
    return matches[0] if matches else None


def _describe(error: ErrorDetails, names: list[str]) -> str:
    field = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        near = nearest(field, names)
        return f"{field}: there is no such field" + (f"; did you mean {near}?" if near else ".")
    if error["type"] == "missing":
        return f"{field}: is missing, and there is no default."
    message = error["msg"].removeprefix("Value error, ")
    expected = message.replace("Input should be", "expected")
    return f"{field}: {expected}, got {error['input']!r}." if field else f"{expected}."


def explain(error: ValidationError, names: list[str]) -> ConfigError:
    """One error for everything that is wrong with the settings. `names`: the valid field names."""
    lines: dict[str, str] = {}
    for finding in error.errors(include_url=False):
        field = str(finding["loc"][0]) if finding["loc"] else ""
        # A union reports one finding for each of its members; they are one mistake of the user.
        if field and field in lines:
            lines[field] = lines[field].replace(", got", f" or {finding['msg'].replace('Input should be ', '')}, got", 1)
        else:
            lines[field] = _describe(finding, names)
    found = list(lines.values())
    explained = all("did you mean" in line or not field for field, line in lines.items())
    mend = "" if explained else "`exactune train --help` lists every field with what it expects."
    if len(found) == 1:
        return ConfigError(found[0], mend)
    return ConfigError("The settings have " + f"{len(found)} mistakes:\n" + "\n".join(f"  {line}" for line in found), mend)
