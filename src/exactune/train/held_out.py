"""Which rows train and which are held out, read before a model is loaded so that a bad row costs no wait."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from exactune.data import Prepared, Rows, prepare, read_rows
from exactune.errors import ConfigError
from exactune.train.config import TrainConfig


@dataclass(frozen=True)
class Sources:
    """Raw rows to train on, and to hold out (None where no rows are)."""

    train: Rows
    held_out: Rows | None


def read_sources(config: TrainConfig) -> Sources:
    """The rows that `config` names.

    Raises:
        DataError: they are missing, empty or unreadable.
        ConfigError: more rows are to be held out than there are.
    """
    train = read_rows(config.dataset, split=config.dataset_split, skip_bad_rows=config.skip_bad_rows)
    if config.eval_dataset:
        return Sources(train, read_rows(config.eval_dataset, split=config.eval_split, skip_bad_rows=config.skip_bad_rows))
    if config.eval_split:
        return Sources(train, read_rows(config.dataset, split=config.eval_split, skip_bad_rows=config.skip_bad_rows))
    if not config.val_size:
        return Sources(train, None)
    return split(train, config.val_size, config.seed)


def split(rows: Rows, val_size: float, seed: int) -> Sources:
    """Hold out `val_size` of `rows` (a share when below 1), chosen by `seed`; both parts keep the order of the source."""
    count = round(val_size if val_size >= 1 else max(1, val_size * len(rows)))
    if count >= len(rows):
        raise ConfigError(f"val_size {val_size:g} holds out all of the {len(rows)} rows.", "Hold out fewer.")
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    return Sources(rows.keep([i for i in range(len(rows)) if i not in chosen]), rows.keep(sorted(chosen)))


def prepare_rows(config: TrainConfig, rows: Rows, tokenizer: Any) -> Prepared:
    """`rows` as token ids and labels."""
    return prepare(
        rows,
        tokenizer,
        max_length=config.max_seq_length,
        format=config.format,
        skip_bad_rows=config.skip_bad_rows,
        train_on=config.train_on,
    )


def describe(source: str, prepared: Prepared) -> dict[str, Any]:
    """What data.json says of one set of rows."""
    lengths = sorted(len(ids) for ids in prepared.dataset["input_ids"])
    return {
        "source": source,
        "format": prepared.format,
        "rows": len(prepared.rows),
        "sequences": len(prepared.dataset),
        "fingerprint": prepared.fingerprint,
        "tokens": prepared.tokens,
        "trained_tokens": prepared.learned_tokens,
        "lengths": {"shortest": lengths[0], "median": lengths[len(lengths) // 2], "longest": lengths[-1]},
        "truncated": prepared.truncated,
        "skipped": [list(entry) for entry in prepared.skipped],
        "dropped": [list(entry) for entry in prepared.dropped],
    }
