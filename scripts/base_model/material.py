"""What the conversations are made of: names, lines, defaults, functions and classes of the training sources, drawn at random."""

import ast
import random
import re
from dataclasses import dataclass, field

from base_model.functions import Function, functions_of
from base_model.stdlib_text import Source

WORD = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True)
class Class:
    name: str
    bases: tuple[str, ...]
    methods: tuple[str, ...]


@dataclass
class Material:
    """Pools to draw from. What is drawn is often mixed anew, so that answering means reading the question, not remembering the library."""

    rng: random.Random
    functions: list[Function] = field(default_factory=list)
    classes: list[Class] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    defaults: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, sources: list[Source], rng: random.Random) -> "Material":
        found = cls(rng)
        names, words = set(), set()
        for source in sources:
            found.functions.extend(functions_of(source))
            for node in ast.walk(ast.parse(source.text)):
                if isinstance(node, ast.ClassDef):
                    methods = tuple(item.name for item in node.body if isinstance(item, ast.FunctionDef))
                    found.classes.append(Class(node.name, tuple(map(ast.unparse, node.bases)), methods))
                elif isinstance(node, (ast.Name, ast.arg, ast.Attribute)):
                    names.add(getattr(node, "id", None) or getattr(node, "arg", None) or node.attr)
        for function in found.functions:
            lines = (line.strip() for line in function.docstring.splitlines())
            found.lines.extend(line for line in lines if 12 <= len(line) <= 90)
            found.defaults.extend(p.default for p in function.parameters if p.default is not None and len(p.default) <= 30)
            words.update(WORD.findall(function.docstring))
        found.names = sorted(name for name in names if 1 < len(name) <= 24)
        found.words = sorted(words)
        return found

    def name(self) -> str:
        """An identifier: a real one, or real words joined to one that does not exist."""
        if self.rng.random() < 0.5:
            return self.rng.choice(self.names)
        parts = [self.rng.choice(self.words) for _ in range(self.rng.choice((1, 1, 2, 2, 3)))]
        style = self.rng.random()
        if style < 0.5:
            return "_".join(part.lower() for part in parts)
        return "".join(part.capitalize() for part in parts) if style < 0.8 else "_" + "".join(parts)

    def distinct_names(self, low: int, high: int) -> list[str]:
        return list(dict.fromkeys(self.name() for _ in range(self.rng.randint(low, high))))

    def dotted(self) -> str:
        return ".".join(self.distinct_names(1, 4))

    def line(self) -> str:
        """A line of documentation, as it stands or with some of its words exchanged."""
        line = self.rng.choice(self.lines)
        if self.rng.random() < 0.4:
            line = WORD.sub(lambda found: self.rng.choice(self.words) if self.rng.random() < 0.3 else found[0], line)
        return line

    def default(self) -> str:
        kind = self.rng.random()
        if kind < 0.7:
            return self.rng.choice(self.defaults)
        return str(self.rng.randint(-9, 4096)) if kind < 0.85 else repr(self.rng.choice(self.words))

    def value(self) -> str:
        return self.rng.choice((self.name, self.name, self.line, self.default, self.dotted))()

    def function(self) -> Function:
        """A real function, or one with a real shape and other names, defaults and summary."""
        function = self.rng.choice(self.functions)
        return function if self.rng.random() < 0.3 else self.renamed(function)

    def renamed(self, function: Function) -> Function:
        from base_model.functions import KEYWORD_ONLY, VAR_KEYWORD, VAR_POSITIONAL, Parameter

        renamed, seen = [], set()
        for p in function.parameters:
            name = p.name if p.name in ("self", "cls", "args", "kwargs") or self.rng.random() < 0.2 else self.name()
            if name in seen:
                continue
            seen.add(name)
            default = None if p.default is None else self.default()
            renamed.append(Parameter(name, p.kind, default))
        shown, star = [], False
        for position, p in enumerate(renamed):
            if p.kind == KEYWORD_ONLY and not star:
                shown, star = [*shown, "*"], True
            stars = {VAR_POSITIONAL: "*", VAR_KEYWORD: "**"}.get(p.kind, "")
            star = star or p.kind == VAR_POSITIONAL
            shown.append(f"{stars}{p.name}" + ("" if p.default is None else f"={p.default}"))
            following = renamed[position + 1].kind if position + 1 < len(renamed) else ""
            if p.kind == "positional-only" and following != p.kind:
                shown.append("/")
        summary = self.line()
        return Function(self.dotted(), f"({', '.join(shown)})", tuple(renamed), summary, summary)
