"""The functions of a source file, read from its syntax tree: nothing is imported, so the result depends on the text alone."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from base_model.stdlib_text import Source

# The words of the Python tutorial ("Special parameters") and, for the two variadic kinds, of `inspect`.
POSITIONAL_ONLY, STANDARD, VAR_POSITIONAL, KEYWORD_ONLY, VAR_KEYWORD = (
    "positional-only",
    "standard",
    "var-positional",
    "keyword-only",
    "var-keyword",
)


@dataclass(frozen=True)
class Parameter:
    name: str
    kind: str
    default: str | None


@dataclass(frozen=True)
class Function:
    """`name` is module-qualified; `signature` is the parenthesised part; `summary` the first line of the docstring."""

    name: str
    signature: str
    parameters: tuple[Parameter, ...]
    docstring: str
    summary: str


def parameters_of(arguments: ast.arguments) -> tuple[Parameter, ...]:
    """Parameters in the order in which they are written, with their kind and the source of their default."""
    positional = [(arg, POSITIONAL_ONLY) for arg in arguments.posonlyargs] + [(arg, STANDARD) for arg in arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + [ast.unparse(value) for value in arguments.defaults]
    found = [Parameter(arg.arg, kind, default) for (arg, kind), default in zip(positional, defaults, strict=True)]
    if arguments.vararg:
        found.append(Parameter(arguments.vararg.arg, VAR_POSITIONAL, None))
    for arg, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(Parameter(arg.arg, KEYWORD_ONLY, None if value is None else ast.unparse(value)))
    if arguments.kwarg:
        found.append(Parameter(arguments.kwarg.arg, VAR_KEYWORD, None))
    return tuple(found)


def functions_of(source: Source) -> Iterator[Function]:
    """Every documented function and method of `source`, nested classes included, functions inside functions not."""

    def visit(body: list[ast.stmt], prefix: str) -> Iterator[Function]:
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from visit(node.body, f"{prefix}.{node.name}")
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = (ast.get_docstring(node) or "").strip()
                if docstring:
                    signature = f"({ast.unparse(node.args)})"
                    summary = docstring.splitlines()[0].strip()
                    yield Function(f"{prefix}.{node.name}", signature, parameters_of(node.args), docstring, summary)

    yield from visit(ast.parse(source.text).body, source.module)
