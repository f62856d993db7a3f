"""Rendered pieces -> token ids and labels, by the offsets the tokenizer gives."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from exactune.data.render import Piece, Span
from exactune.errors import DataError

IGNORED = -100  # the label that no loss counts


@dataclass
class Encoded:
    """One training sequence: ids, and for each whether it is learned. `offsets` are the characters of `text` each came from."""

    ids: list[int]
    learned: list[bool]
    text: str
    offsets: list[Span]
    prompt_differs: bool = False
    divides: bool = False  # one of several parts of a text

    def divided(self, max_length: int | None) -> list[Encoded]:
        """This sequence as parts of at most `max_length` tokens, in order. The first token of each part has nothing before it, and is
        not learned there."""
        if max_length is None or len(self.ids) <= max_length:
            return [self]
        # The last token of a part opens the next one too: it is learned in the one and read in the other.
        starts = range(0, len(self.ids) - 1, max_length - 1)
        cuts = [slice(start, start + max_length) for start in starts]
        return [Encoded(self.ids[cut], [False, *self.learned[cut][1:]], self.text, self.offsets[cut], divides=True) for cut in cuts]

    @property
    def labels(self) -> list[int]:
        return [token if on else IGNORED for token, on in zip(self.ids, self.learned)]


class Encoder:
    """Tokenises pieces in batches and turns their character spans into token masks."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    @cached_property
    def control(self) -> frozenset[int]:
        """Ids that text alone does not become: special and other added tokens, but not added white space."""
        added = {index for token, index in self.tokenizer.get_added_vocab().items() if token.strip()}
        return frozenset(added | set(self.tokenizer.all_special_ids))

    @cached_property
    def _leading(self) -> list[int]:
        """What this tokenizer puts before plain text (BOS, for most)."""
        ids = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return next((ids[:n] for n in range(len(ids) - len(bare) + 1) if ids[n : n + len(bare)] == bare), [])

    def encode(self, pieces: Sequence[Piece]) -> list[Encoded]:
        """Ids and masks of `pieces`, none truncated. The first token of a sequence is never learned: nothing comes before it."""
        if not pieces:
            return []
        texts = [piece.text for piece in pieces]
        if self.tokenizer.is_fast:
            out = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
            offsets = out["offset_mapping"]
        else:
            out = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            offsets = [self._offsets_by_decoding(ids, text) for ids, text in zip(out["input_ids"], texts)]
        return [self._encoded(piece, *self._parted(piece, ids, spans)) for piece, ids, spans in zip(pieces, out["input_ids"], offsets)]

    def _parted(self, piece: Piece, ids: list[int], offsets: list[Span]) -> tuple[list[int], list[Span]]:
        """The same ids, but none that reaches across the end of a generation prompt, which the model is given in tokens of its own.

        Qwen3.5's prompt ends with a line break, and an answer without thoughts begins with another: together they are one token.
        """
        ends = [end for _, end in offsets]
        cuts = [start for start in piece.starts if (at := bisect_right(ends, start)) < len(ids) and offsets[at][0] < start]
        if not cuts or not self.tokenizer.is_fast:
            return ids, offsets
        bounds = [0, *cuts, len(piece.text)]
        parts = [piece.text[start:end] for start, end in pairwise(bounds)]
        out = self.tokenizer(parts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
        parted = [token for part in out["input_ids"] for token in part]
        if self.tokenizer.decode(parted) != self.tokenizer.decode(ids):  # a tokenizer that marks the beginning of every text
            return ids, offsets
        return parted, [(start + a, start + b) for start, part in zip(bounds, out["offset_mapping"]) for a, b in part]

    def _offsets_by_decoding(self, ids: list[int], text: str) -> list[Span]:
        """Offsets for tokenizers that give none: each token's end is the length its prefix decodes to, if that reproduces the text."""
        if self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
            raise DataError(
                "This slow tokenizer does not decode to its own input, so what each token came from cannot be told.",
                "Use its fast version.",
            )
        ends = [len(self.tokenizer.decode(ids[: n + 1], clean_up_tokenization_spaces=False)) for n in range(len(ids))]
        return list(zip([0, *ends[:-1]], ends))

    def _encoded(self, piece: Piece, ids: list[int], offsets: list[Span]) -> Encoded:
        ends = [end for _, end in offsets]
        learned = [False] * len(ids)
        tail_id = self._end_of_turn(piece, ids, ends)
        for start, end in piece.spans:
            # A token that begins before the span and ends in it holds its first characters; one that ends after it is the next turn's.
            low, high = bisect_right(ends, start), bisect_right(ends, end)
            if piece.turns:
                high = self._close(ids, offsets, piece.text, low, high, tail_id)
            learned[low:high] = [True] * (high - low)
        if piece.plain:
            lead, closing = self._leading, [] if ids and ids[-1] == self.eos else [self.eos]
            at_end = (len(piece.text), len(piece.text))
            offsets = [(0, 0)] * len(lead) + list(offsets) + [at_end] * len(closing)
            ids, learned = [*lead, *ids, *closing], [False] * len(lead) + learned + [True] * len(closing)
        if learned:
            learned[0] = False
        return Encoded(ids, learned, piece.text, list(offsets), piece.prompt_differs)

    @cached_property
    def eos(self) -> int:
        """The id that ends plain text. Raises `DataError` where the tokenizer has none."""
        if self.tokenizer.eos_token_id is None:
            raise DataError("The tokenizer has no end-of-text token, so a model could not learn to stop.", "Set `tokenizer.eos_token`.")
        return self.tokenizer.eos_token_id

    def _end_of_turn(self, piece: Piece, ids: list[int], ends: list[int]) -> int | None:
        """The control token right after the last span, where a template's generation blocks leave the end of turn outside."""
        if not piece.turns or not piece.spans or piece.spans[-1][1] >= len(piece.text):
            return None
        after = bisect_right(ends, piece.spans[-1][1])
        inside_ends_control = after > 0 and ids[after - 1] in self.control
        return ids[after] if after < len(ids) and ids[after] in self.control and not inside_ends_control else None

    def _close(self, ids: list[int], offsets: list[Span], text: str, low: int, high: int, tail_id: int | None) -> int:
        """The end of a learned turn: with its end-of-turn token, without the white space that a template writes after that."""
        end = high
        while end > low and ids[end - 1] not in self.control and not text[slice(*offsets[end - 1])].strip():
            end -= 1
        if end > low and ids[end - 1] in self.control:
            return end
        if tail_id is not None and high < len(ids) and ids[high] == tail_id:
            return high + 1
        return high
