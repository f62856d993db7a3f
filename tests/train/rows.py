"""Small data sets for the tests of the objectives: rows to imitate, pairs to prefer, labels, plain text."""

import json
from pathlib import Path

WORDS = ["river", "stone", "cloud", "lamp", "paper", "glass", "wood", "iron", "salt", "leaf"]


def chat(prompt, answer):
    return [{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}]


def pairs(count):
    """Rows of unequal length: the chosen answer is JSON, the rejected one the same word bare and repeated."""
    rows = []
    for i in range(count):
        word = WORDS[i % len(WORDS)]
        prompt, chosen = chat(f"Say {word}" + " please" * (i % 4), json.dumps({"word": word} | ({"times": i} if i % 3 else {})))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": [{"role": "assistant", "content": f"{word} " * (1 + i % 5)}]})
    return rows


def labelled(count):
    rows = []
    for i, pair in enumerate(pairs(count)):
        side = "rejected" if i % 2 else "chosen"
        rows.append({"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"})
    return rows


def answers(count):
    return [{"messages": pair["prompt"] + pair["chosen"]} for pair in pairs(count)]


def texts(count):
    return [{"text": " ".join([WORDS[(i + k) % len(WORDS)] for k in range(5 + i % 7)])} for i in range(count)]


def write(folder, name, rows):
    path = Path(folder) / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


FOR = {"sft": answers, "pretrain": texts, "kto": labelled, "grpo": answers}


def rows_for(objective, count):
    """Rows that suit `objective`."""
    return FOR.get(objective, pairs)(count)
