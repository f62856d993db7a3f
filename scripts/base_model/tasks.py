"""The kinds of question that the base model's conversations ask: each takes the material and returns a question and its answer.

They teach to copy, to pick and to change formats, in many forms. None asks for the bundled data set's own object: learning that is what
fine-tuning is for.
"""

import json
from collections.abc import Callable

from base_model.functions import KEYWORD_ONLY, POSITIONAL_ONLY, STANDARD, VAR_KEYWORD, VAR_POSITIONAL, Function
from base_model.material import Material

Task = Callable[[Material], tuple[str, str]]
SPOKEN = {
    POSITIONAL_ONLY: "by position",
    STANDARD: "by position or name",
    VAR_POSITIONAL: "any further positions",
    KEYWORD_ONLY: "by name",
    VAR_KEYWORD: "any further names",
}
OWN_FORMAT = {"kind", "parameters", "summary"}  # the keys that only the bundled data set's answers use together


def compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def ask(m: Material, wordings: tuple[str, ...], content: str) -> str:
    """One of the wordings with the content below, or now and then above."""
    wording = m.rng.choice(wordings)
    return f"{content}\n\n{wording}" if m.rng.random() < 0.15 else f"{wording}{m.rng.choice((chr(10), chr(10) * 2))}{content}"


def shown(m: Material, function: Function) -> str:
    """A function as a question shows it: its signature, often with the summary."""
    head = m.rng.choice(("", "", "def ")) + function.name + function.signature
    return head if m.rng.random() < 0.3 else f"{head}\n{function.summary}"


def echo(m: Material) -> tuple[str, str]:
    text = "\n".join(m.value() for _ in range(m.rng.choice((1, 1, 1, 2, 3))))
    return ask(m, ("Repeat this exactly.", "Copy this.", "Say this again, word for word.", "Echo:"), text), text


def nth_line(m: Material) -> tuple[str, str]:
    lines = [m.value() for _ in range(m.rng.randint(2, 6))]
    n = m.rng.randrange(len(lines))
    return ask(m, (f"Quote line {n + 1}.", f"What does line {n + 1} say?"), "\n".join(lines)), lines[n]


def json_string(m: Material) -> tuple[str, str]:
    text = m.line() if m.rng.random() < 0.7 else m.value()
    return ask(m, ("Write this as a JSON string.", "JSON string, please."), text), compact(text)


def json_list(m: Material) -> tuple[str, str]:
    items = [m.rng.choice((m.name, m.default))() for _ in range(m.rng.randint(1, 7))]
    return ask(m, ("Write these as a JSON list.", "Turn this list to JSON."), m.rng.choice((", ", "\n", " ")).join(items)), compact(items)


def fields(m: Material) -> dict[str, str]:
    return {name: m.value() for name in m.distinct_names(1, 5) if name not in OWN_FORMAT}


def json_object(m: Material) -> tuple[str, str]:
    data = fields(m)
    text = "\n".join(f"{key}{m.rng.choice((': ', ' = '))}{value}" for key, value in data.items())
    return ask(m, ("Write this as a JSON object.", "Give me these fields as JSON."), text), compact(data)


def json_to_lines(m: Material) -> tuple[str, str]:
    data = fields(m)
    return ask(m, ("List the fields of this object, one a line.",), compact(data)), "\n".join(f"{k}: {v}" for k, v in data.items())


def json_lookup(m: Material) -> tuple[str, str]:
    data = fields(m) or {"x": "y"}
    key = m.rng.choice(list(data))
    return ask(m, (f"What is the value of {key}?", f"Look up {key}."), m.rng.choice((compact(data), json.dumps(data, indent=2)))), data[key]


def json_layout(m: Material) -> tuple[str, str]:
    data = fields(m) | {m.name(): [m.name() for _ in range(m.rng.randint(0, 3))]}
    wide, tight = json.dumps(data, indent=2, ensure_ascii=False), compact(data)
    if m.rng.random() < 0.5:
        return ask(m, ("Write this JSON on one line.", "Compact this."), wide), tight
    return ask(m, ("Indent this JSON by two.", "Lay this JSON out."), tight), wide


def records(m: Material) -> tuple[str, str]:
    """Lines of a table to an array of objects; an empty cell has no key."""
    columns = m.distinct_names(2, 3)
    if OWN_FORMAT.intersection(columns):
        columns = ["key", "text"]
    rows = [[m.rng.choice((m.name, m.default))() if m.rng.random() < 0.85 else "" for _ in columns] for _ in range(m.rng.randint(1, 5))]
    table = "\n".join(" | ".join(row) for row in [columns, *rows])
    answer = [{key: cell for key, cell in zip(columns, row, strict=True) if cell} for row in rows]
    return ask(m, ("Turn this table to JSON.", "Write each row as an object."), table), compact(answer)


def assignments(m: Material) -> tuple[str, str]:
    """A list of names, some with values, to an array of objects whose second key is there only where there is a value."""
    first, second = m.rng.sample(("id", "key", "item", "arg", "field", "value", "set", "is", "init"), 2)
    pairs = [(name, m.default() if m.rng.random() < 0.5 else None) for name in m.distinct_names(1, 6)]
    text = ", ".join(name if value is None else f"{name}={value}" for name, value in pairs)
    answer = [{first: name} | ({} if value is None else {second: value}) for name, value in pairs]
    return ask(m, (f"Write as JSON with {first} and {second}.",), text), compact(answer)


def parameter_names(m: Material) -> tuple[str, str]:
    f = m.function()
    names = [p.name for p in f.parameters]
    wordings = ("List the parameters of this function.", "Which arguments does this take?", "Name the parameters.")
    style = m.rng.random()
    if style < 0.4:
        return ask(m, wordings, shown(m, f)), "\n".join(f"- {name}" for name in names) or "It takes none."
    if style < 0.7:
        return ask(m, wordings, shown(m, f)) + " As JSON.", compact(names)
    return ask(m, wordings, shown(m, f)) + " On one line.", ", ".join(names) or "none"


def parameter_kinds(m: Material) -> tuple[str, str]:
    f = m.function()
    answer = "\n".join(f"{p.name}: {SPOKEN[p.kind]}" for p in f.parameters) or "It takes none."
    return ask(m, ("How may each argument be passed?", "How is each parameter given?"), shown(m, f)), answer


def parameter_defaults(m: Material) -> tuple[str, str]:
    f = m.function()
    given = {p.name: p.default for p in f.parameters if p.default is not None}
    if m.rng.random() < 0.5:
        return ask(m, ("Which arguments have defaults?",), shown(m, f)), "\n".join(f"{k} = {v}" for k, v in given.items()) or "None have."
    return ask(m, ("Write the defaults as JSON.", "Defaults as a JSON object?"), shown(m, f)), compact(given)


def default_of(m: Material) -> tuple[str, str]:
    f = m.function()
    if not f.parameters:
        return parameter_names(m)
    p = m.rng.choice(f.parameters)
    return ask(m, (f"What is the default of {p.name}?",), shown(m, f)), "It has none." if p.default is None else p.default


def function_name(m: Material) -> tuple[str, str]:
    f = m.function()
    full = m.rng.random() < 0.6
    wording = "What is the full name of this function?" if full else "What is this function called, without its module?"
    return ask(m, (wording,), shown(m, f)), f.name if full else f.name.split(".")[-1]


def first_line(m: Material) -> tuple[str, str]:
    f = m.rng.choice(m.functions)
    text = "\n".join(f.docstring.splitlines()[:6])
    return ask(m, ("What is the first line?", "Sum this docstring up in its own words.", "Give me the headline."), text), f.summary


def rewrite_function(m: Material) -> tuple[str, str]:
    """The same facts in other formats: Markdown, a stub, field lists, tags, nested names."""
    f = m.function()
    name, question = f.name, f"{f.name}{f.signature}\n{f.summary}"
    given = [(p.name, p.default) for p in f.parameters]
    formats = {
        "as Markdown": f"### {name}\n{f.summary}\n" + "\n".join(f"- `{n}`" + (f" ({d})" if d else "") for n, d in given),
        "as a stub": f'def {name.split(".")[-1]}{f.signature}:\n    """{f.summary}"""',
        "as a field list": f"{f.summary}\n" + "\n".join(f":param {n}:" + (f" {d}" if d else "") for n, d in given),
        "as XML": f'<function id="{name}">' + "".join(f"<arg>{n}</arg>" for n, _ in given) + f"<doc>{f.summary}</doc></function>",
        "as one flat JSON object": compact({"function": name} | {n: d or "" for n, d in given} | {"doc": f.summary}),
        "as a JSON list": compact([name, [n for n, _ in given], f.summary]),
        "as JSON with its name and doc only": compact({"id": name, "doc": f.summary}),
        "as lines": "\n".join([f"function: {name}", *(f"takes: {n}" for n, _ in given), f"does: {f.summary}"]),
    }
    wording = m.rng.choice(list(formats))
    return ask(m, (f"Write this function {wording}.", f"This function {wording}, please."), question), formats[wording]


def class_object(m: Material) -> tuple[str, str]:
    c = m.rng.choice(m.classes)
    methods = [m.name() if m.rng.random() < 0.4 else name for name in c.methods[:8]]
    bases = f"({', '.join(c.bases)})" if c.bases else ""
    text = f"class {c.name}{bases}:\n" + "\n".join(f"    def {name}(self): ..." for name in methods)
    answer = {"class": c.name} | ({"bases": list(c.bases)} if c.bases else {}) | {"methods": methods}
    return ask(m, ("Outline this class as JSON.", "Which class and methods are these? JSON."), text), compact(answer)


def reorder(m: Material) -> tuple[str, str]:
    names = m.distinct_names(2, 6)
    wording, answer = m.rng.choice((
        ("Reverse this list.", names[::-1]), ("Sort these.", sorted(names)), ("Only the first.", names[:1]), ("Only the last.", names[-1:]),
        ("In upper case.", [n.upper() for n in names]), ("Without underscores.", [n.replace("_", "") for n in names]),
    ))  # fmt: skip
    return ask(m, (wording,), ", ".join(names)), ", ".join(answer)


def explain(m: Material) -> tuple[str, str]:
    """What a real function does, from memory: the only task that asks for knowledge of the library."""
    f = m.rng.choice(m.functions)
    question = m.rng.choice((f"What does {f.name} do?", f"Explain {f.name}{f.signature}.", f"Tell me about {f.name}."))
    return question, f.docstring[:400].strip()


TASKS: dict[Task, int] = {
    echo: 3, nth_line: 3, json_string: 3, json_list: 2, json_object: 3, json_to_lines: 1, json_lookup: 2, json_layout: 1, records: 2,
    assignments: 4, parameter_names: 4, parameter_kinds: 5, parameter_defaults: 3, default_of: 2, function_name: 2, first_line: 2,
    rewrite_function: 8, class_object: 1, reorder: 1, explain: 2,
}  # fmt: skip
