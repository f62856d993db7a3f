"""Prepares the base model's training text as token ids: `PYTHONPATH=scripts python -m base_model.build_corpus --out DIR`.

Writes the tokenizer into `DIR/tokenizer` and `DIR/ids.npz` with four uint16 streams: `plain` and `chat` to train on, `plain_held_out` and
`chat_held_out` (made of the held-out modules) to measure perplexity on. Needs no GPU; the same interpreter gives the same ids.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from base_model.material import Material
from base_model.plain_text import documents
from base_model.shape import CONTEXT
from base_model.stdlib_text import stdlib_sources
from base_model.tasks import TASKS
from base_model.tokenizer import BOS, END_OF_TEXT, IM_END, IM_START, save_tokenizer, train_tokenizer

ROWS = Path(__file__).parents[2] / "src" / "exactune" / "assets" / "dataset" / "train.jsonl"
SYSTEM = ("You are a helpful assistant.", "You read Python and answer briefly.", "Answer exactly and say nothing else.")
SEED = 20


def conversation(material: Material) -> str:
    """One to three turns in the chat template's own form."""
    rng, turns = material.rng, []
    if rng.random() < 0.15:
        turns.append(("system", rng.choice(SYSTEM)))
    for task in rng.choices(list(TASKS), weights=list(TASKS.values()), k=rng.choice((1, 1, 1, 2, 3))):
        question, answer = task(material)
        turns += [("user", question), ("assistant", answer)]
    return BOS + "".join(f"{IM_START}{role}\n{content}{IM_END}\n" for role, content in turns)


def encoded(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    return np.concatenate([np.array(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch(texts)])


def chat_ids(tokenizer: Tokenizer, *, held_out: bool, tokens: int) -> np.ndarray:
    """A stream of about `tokens` tokens of conversations about one side's modules."""
    rng = random.Random(SEED + held_out)
    material = Material.of([source for source in stdlib_sources() if source.held_out == held_out], rng)
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < tokens:
        parts.append(encoded(tokenizer, [conversation(material) for _ in range(2000)]))
    return np.concatenate(parts)[:tokens]


def plain_ids(tokenizer: Tokenizer, *, held_out: bool) -> np.ndarray:
    texts = [BOS + text + END_OF_TEXT for text in documents(held_out=held_out)]
    random.Random(SEED).shuffle(texts)
    return encoded(tokenizer, texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chat-tokens", type=int, default=15_000_000)
    args = parser.parse_args()
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    tokenizer = train_tokenizer([*documents(held_out=False), *(f"{row['instruction']}\n{row['response']}" for row in rows)])
    save_tokenizer(tokenizer, args.out / "tokenizer", CONTEXT)
    streams = {
        "plain": plain_ids(tokenizer, held_out=False),
        "chat": chat_ids(tokenizer, held_out=False, tokens=args.chat_tokens),
        "plain_held_out": plain_ids(tokenizer, held_out=True),
        "chat_held_out": chat_ids(tokenizer, held_out=True, tokens=args.chat_tokens // 50),
    }
    np.savez_compressed(args.out / "ids.npz", **streams)
    print({name: len(ids) for name, ids in streams.items()}, f"{(args.out / 'ids.npz').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
