"""Read -> detect the format -> render with the chat template -> mask -> pack. No model code."""

from exactune.data.check import check
from exactune.data.clean import clean
from exactune.data.findings import CheckReport
from exactune.data.formats import detect
from exactune.data.packing import pack
from exactune.data.prepare import Prepared, fingerprint, prepare, prompts_and_answers
from exactune.data.read import read_rows
from exactune.data.rows import Rows

__all__ = [
    "CheckReport",
    "Prepared",
    "Rows",
    "check",
    "clean",
    "detect",
    "fingerprint",
    "pack",
    "prepare",
    "prompts_and_answers",
    "read_rows",
]
