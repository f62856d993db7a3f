"""Read -> detect the format -> render with the chat template -> mask -> pack. No model code."""

from exactune.data.formats import detect
from exactune.data.prepare import Prepared, fingerprint, prepare, prompts_and_answers
from exactune.data.read import read_rows
from exactune.data.rows import Rows

__all__ = ["Prepared", "Rows", "detect", "fingerprint", "prepare", "prompts_and_answers", "read_rows"]
