"""Every kind of fault is found where it was planted, and nothing is found in a clean set."""

import copy
import json
import random
import sys

import pytest
from chat_families import bundled, tokenizer_of

from exactune import assets
from exactune.data.check import check
from exactune.data.clean import clean
from exactune.data.findings import KINDS
from exactune.errors import ConfigError, DataError, OutputError

PLANT = 17  # the row that a fault is planted in (line 18)
WORDS = """river stone window paper engine garden silver moment number candle bridge forest summer market letter island music
planet harbor ladder mirror orange pencil quiver rocket saddle temple umbrella velvet walnut yellow zephyr anchor basket""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def tokenizer():
    return bundled()


def clean_rows(count=60):
    """Conversations that differ from one another, of one to three exchanges."""
    rng = random.Random(7)
    say = lambda: " ".join(rng.choice(WORDS) for _ in range(rng.randint(12, 30))) + "."  # noqa: E731
    return [
        {"messages": [{"role": role, "content": say()} for _ in range(rng.randint(1, 3)) for role in ("user", "assistant")]}
        for _ in range(count)
    ]


def set_answer(text):
    def plant(rows):
        rows[PLANT]["messages"][-1]["content"] = text

    return plant


def add_to_question(text):
    def plant(rows):
        rows[PLANT]["messages"][0]["content"] += f" {text}"

    return plant


def set_messages(make):
    def plant(rows):
        rows[PLANT]["messages"] = make(rows[PLANT]["messages"])

    return plant


def set_row(make):
    def plant(rows):
        rows[PLANT] = make(rows)

    return plant


def nearly(row):
    row = copy.deepcopy(row)
    row["messages"][0]["content"] = " ".join([*(WORDS * 3), row["messages"][0]["content"]])
    other = copy.deepcopy(row)
    other["messages"][-1]["content"] += " Indeed."
    return row, other


def plant_near(rows):
    rows[3], rows[PLANT] = nearly(rows[3])


PLANTED = {
    "unknown_role": set_messages(lambda m: [{**m[0], "role": "narrator"}, *m[1:]]),
    "missing_role": set_messages(lambda m: [{"content": "x"}, *m[1:]]),
    "empty_message": set_answer("  "),
    "empty_messages_list": set_messages(lambda m: []),
    "wrong_type": set_messages(lambda m: [{"role": "user", "content": {"a": 1}}, *m[1:]]),
    "messages_is_a_number": set_messages(lambda m: 3),
    "missing_field": set_row(lambda rows: {"id": 3}),
    "empty_field": set_row(lambda rows: {"messages": None}),
    "not_text": set_messages(lambda m: [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, *m[1:]]),
    "bad_tool_call": set_messages(lambda m: [*m[:-1], {"role": "assistant", "tool_calls": [{"id": "1"}]}]),
    "mixed_formats": set_row(lambda rows: {"instruction": "Say hello", "response": "Hello there"}),
    "nothing_to_learn": set_messages(lambda m: m[:1]),
    "weight_zero": set_messages(lambda m: [m[0], {**m[1], "weight": 0}]),
    "assistant_first": set_messages(lambda m: m[1:] if len(m) > 2 else [m[1], m[0], m[1]]),
    "two_users": set_messages(lambda m: [m[0], *m]),
    "late_system": set_messages(lambda m: [*m[:1], {"role": "system", "content": "Be kind."}, *m[1:]]),
    "orphan_tool": set_messages(lambda m: [m[0], {"role": "tool", "content": "4"}, m[1]]),
    "unanswered_last_turn": set_messages(lambda m: [*m, {"role": "user", "content": "And now?"}]),
    "duplicate": set_row(lambda rows: copy.deepcopy(rows[3])),
    "duplicate_case_space": set_row(lambda rows: json.loads(json.dumps(rows[3]).replace("river", "River").replace(" stone", "   stone"))),
    "near_duplicate": plant_near,
    "conflicting_answers": set_row(
        lambda rows: {"messages": [*rows[3]["messages"][:-1], {"role": "assistant", "content": "No, rather walnut."}]}
    ),
    "broken_unicode": set_answer("caf\ufffd is French"),
    "half_surrogate": set_answer("smile \ud83d"),
    "mojibake": set_answer("Das ist schÃ¶n, und itâ€™s fine"),
    "control_character": add_to_question("a\x00b"),
    "special_token_in_text": add_to_question("<|im_end|>\n<|im_start|>system"),
    "foreign_special_token": add_to_question("[INST] hello"),
    "huge_field": set_answer(" ".join(f"word{n}" for n in range(20_000))),
    "degenerate_repetition": set_answer("and so on " * 200),
    "answer_repeats_question": set_messages(lambda m: [m[0], {"role": "assistant", "content": m[0]["content"]}]),
    "unclosed_thinking": set_answer("<think>\nhm, let me see. walnut"),
    "language_outlier": set_messages(
        lambda m: [{"role": "user", "content": "Расскажи про реку"}, {"role": "assistant", "content": "Река течёт к морю"}]
    ),
    "length_outlier": set_answer(" ".join(f"word{n}" for n in range(1500))),
    "answer_cut": set_answer(" ".join(f"word{n}" for n in range(400))),
    "answer_lost": set_messages(lambda m: [{"role": "user", "content": " ".join(f"word{n}" for n in range(400))}, m[1]]),
}
EXPECTED = {
    "missing_role": "unknown_role",
    "empty_messages_list": "empty_field",
    "messages_is_a_number": "wrong_type",
    "weight_zero": "nothing_to_learn",
    "assistant_first": "roles_out_of_order",
    "two_users": "roles_out_of_order",
    "late_system": "roles_out_of_order",
    "orphan_tool": "roles_out_of_order",
    "duplicate_case_space": "duplicate",
    "half_surrogate": "broken_unicode",
    "foreign_special_token": "special_token_in_text",
}
# what a fault drags along by its nature
ALSO = {
    "huge_field": {"length_outlier", "answer_cut"},
    "length_outlier": {"answer_cut"},
    "near_duplicate": {"conflicting_answers"},
    "conflicting_answers": {"near_duplicate"},
}
MAX_LENGTH = 1024


def test_no_false_alarm_on_clean_rows(tokenizer):
    report = check(clean_rows(), tokenizer, max_length=MAX_LENGTH, held_out=clean_rows(80)[60:])
    assert report.findings == []
    assert report.exit_code(strict=True) == 0
    assert report.formats == {"messages": 60}
    assert sum(report.lengths.values()) == report.measured_rows == 60
    assert 0 < report.learned_share < 1


def test_no_false_alarm_on_the_bundled_rows(tokenizer):
    report = check(assets.dataset("held_out"), tokenizer, max_length=MAX_LENGTH)
    assert report.findings == []


@pytest.mark.parametrize("fault", PLANTED)
def test_every_planted_fault_is_found_in_its_place(fault, tokenizer):
    rows = clean_rows()
    PLANTED[fault](rows)
    report = check(rows, tokenizer, max_length=MAX_LENGTH)
    kind = EXPECTED.get(fault, fault)
    found = {finding.kind: finding for finding in report.findings}
    assert kind in found
    assert found[kind].rows == [PLANT]
    assert found[kind].places[0].startswith(f"row {PLANT + 1}")
    assert set(found) <= {kind} | ALSO.get(fault, set())
    assert report.exit_code() == (KINDS[kind][0] == "error")
    json.dumps(report.to_json())


def test_faults_of_whole_files(tmp_path, tokenizer):
    lines = [json.dumps(row) for row in clean_rows()]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*lines[:5], "{broken", "[1]", *lines[5:]]))
    (finding,) = check(path, tokenizer).findings
    assert (finding.kind, finding.count) == ("unreadable_row", 2)
    assert finding.places[0].startswith("line 6: not JSON")
    path.write_bytes(b"\xff\xfe\x00")
    assert [f.kind for f in check(path, tokenizer).findings] == ["unreadable"]
    path.write_text('{"a": 1}\n')
    assert [f.kind for f in check(path, tokenizer).findings] == ["unknown_format"]


def test_held_out_rows_in_the_training_set(tokenizer):
    rows, held_out = clean_rows(), clean_rows(70)[60:]
    rows[PLANT] = copy.deepcopy(held_out[2])
    rows[20], held_out[5] = nearly(rows[20])
    report = check(rows, tokenizer, held_out=held_out)
    assert {finding.kind: finding.rows for finding in report.findings} == {"contamination": [PLANT], "near_contamination": [20]}
    assert report.findings[0].places == [f"row {PLANT + 1}: like row 3 of the held-out set"]


def test_json_answers_that_are_not():
    rows = [{"instruction": f"Describe {word} and {n}", "response": json.dumps({"name": word, "n": n})} for n, word in enumerate(WORDS)]
    assert check(rows).findings == []
    rows[PLANT]["response"] = '{"name": "half'
    (finding,) = check(rows).findings
    assert (finding.kind, finding.rows) == ("answer_not_json", [PLANT])


def test_pairs_and_labels():
    pairs = [{"prompt": f"Tell of {word}", "chosen": f"The {word} is fine", "rejected": f"No {word}"} for word in WORDS]
    assert check(pairs).findings == []
    pairs[3]["rejected"] = pairs[3]["chosen"]
    assert [(f.kind, f.rows) for f in check(pairs).findings] == [("same_pair", [3])]
    labelled = [{"prompt": f"Tell of {word}", "completion": f"The {word} is fine", "label": True} for word in WORDS]
    labelled[4]["label"] = "good"
    assert [(f.kind, f.rows) for f in check(labelled).findings] == [("bad_label", [4])]


def test_what_only_the_template_knows(tokenizer):
    rows = clean_rows()
    rows[PLANT]["messages"].insert(0, {"role": "system", "content": "Be kind."})
    (finding,) = check(rows, tokenizer_of("gemma"), max_length=MAX_LENGTH).findings
    assert (finding.kind, finding.rows) == ("template_refuses", [PLANT])
    endless = bundled()
    endless.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert [f.kind for f in check(clean_rows(), endless).findings] == ["no_end_of_turn"]


def test_a_template_that_does_not_show_single_turns(tokenizer):
    halved = bundled()
    halved.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role != 'assistant' %}{{ m.content }}<|im_end|>"
        "{% elif 'walnut shell' in m.content %}{% generation %}A{% endgeneration %}{% generation %} shell.<|im_end|>{% endgeneration %}"
        "{% else %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = clean_rows()
    assert check(rows, halved, train_on="last_turn").findings == []
    longer = next(index for index, row in enumerate(rows) if len(row["messages"]) > 2)  # all of a single turn is its last turn
    rows[longer]["messages"][-1]["content"] = "This is a walnut shell."
    (finding,) = check(rows, halved, train_on="last_turn").findings
    assert (finding.kind, finding.rows) == ("template_unclear", [longer])


def test_near_duplicates_that_nobody_looked_for_are_told(monkeypatch):
    rows = clean_rows()
    plant_near(rows)
    assert {"near_duplicate"} <= {finding.kind for finding in check(rows).findings}
    monkeypatch.setitem(sys.modules, "rensa", None)
    found = {finding.kind for finding in check(rows).findings}
    assert "near_duplicates_unchecked" in found and "near_duplicate" not in found


# Faults of more than one row, of files and of templates: each has a test of its own.
ELSEWHERE = {
    "unreadable": test_faults_of_whole_files,
    "unreadable_row": test_faults_of_whole_files,
    "unknown_format": test_faults_of_whole_files,
    "contamination": test_held_out_rows_in_the_training_set,
    "near_contamination": test_held_out_rows_in_the_training_set,
    "answer_not_json": test_json_answers_that_are_not,
    "same_pair": test_pairs_and_labels,
    "bad_label": test_pairs_and_labels,
    "template_refuses": test_what_only_the_template_knows,
    "no_end_of_turn": test_what_only_the_template_knows,
    "template_unclear": test_a_template_that_does_not_show_single_turns,
    "near_duplicates_unchecked": test_near_duplicates_that_nobody_looked_for_are_told,
}


def test_every_kind_of_fault_is_planted():
    planted = {EXPECTED.get(fault, fault) for fault in PLANTED}
    assert planted | ELSEWHERE.keys() == KINDS.keys() and not planted & ELSEWHERE.keys()
    assert len(planted) >= 25 and len(PLANTED) >= 35, (len(planted), len(PLANTED))


def test_long_sets_are_sampled_but_every_cut_answer_is_found(tokenizer):
    from exactune.data.formats import named
    from exactune.data.lengths import measure
    from exactune.data.prepare import renderer

    rows = clean_rows(200)
    set_answer(" ".join(f"word{n}" for n in range(400)))(rows)
    found = measure(rows, renderer(named("messages"), tokenizer, "auto"), tokenizer, MAX_LENGTH, sample=20)
    assert found.measured == 20
    assert found.cut == [PLANT]


def test_clean_keeps_what_is_good_and_logs_the_rest(tmp_path, tokenizer):
    rows = clean_rows()
    rows[2]["messages"][0]["content"] += " \x00"
    set_answer("Das ist schÃ¶n")(rows)
    rows[30] = copy.deepcopy(rows[3])
    rows[31]["messages"][-1]["content"] = ""
    source, out = tmp_path / "rows.jsonl", tmp_path / "out" / "clean.jsonl"
    source.write_text("\n".join([*map(json.dumps, rows), "not json"]))
    report = clean(source, out, tokenizer, max_length=MAX_LENGTH)
    assert report.dropped == {"empty_message": 1, "duplicate": 1, "unreadable_row": 1}
    assert report.changed == {"control_character": 1, "mojibake": 1}
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(kept) == report.kept == 58
    assert kept[PLANT]["messages"][-1]["content"] == "Das ist schön"
    assert kept[0] == rows[0]
    log = [json.loads(line) for line in out.with_suffix(".log.jsonl").read_text().splitlines()]
    assert [(entry["row"], entry["action"]) for entry in log] == [
        (61, "dropped"), (3, "changed"), (PLANT + 1, "changed"), (31, "dropped"), (32, "dropped"),
    ]  # fmt: skip
    assert check(out, tokenizer, max_length=MAX_LENGTH).findings == []
    with pytest.raises(OutputError, match="there already"):
        clean(source, out, tokenizer)
    assert clean(source, out, tokenizer, keep=["duplicate"], overwrite=True).kept == 59
    with pytest.raises(ConfigError, match="no fault called 'dup'"):
        clean(source, tmp_path / "x.jsonl", keep=["dup"])
    with pytest.raises(DataError, match="No row"):
        clean([rows[31]], tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()
