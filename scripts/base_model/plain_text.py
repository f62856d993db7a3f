"""The plain part of the base model's training text: source files, documentation topics and the licence."""

import ast

from base_model.stdlib_text import Source, licence_text, stdlib_sources

TOPICS = "pydoc_data/topics.py"


def topics_of(source: Source) -> list[str]:
    """pydoc's documentation topics, which that file keeps as one dictionary of strings."""
    (assignment,) = (node for node in ast.parse(source.text).body if isinstance(node, ast.Assign))
    return list(ast.literal_eval(assignment.value).values())


def documents(*, held_out: bool) -> list[str]:
    """Whole documents of one side. The licence and the topics belong to the training side."""
    found = []
    for source in stdlib_sources():
        if source.held_out == held_out:
            found.extend(topics_of(source) if source.name == TOPICS else [source.text])
    return found if held_out else [*found, licence_text()]
