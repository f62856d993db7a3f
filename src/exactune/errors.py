"""The errors a user can meet. Each says what is wrong and, where there is one, the mend.

The command line prints `str(error)` and exits 2; `--debug` shows the traceback. Anything that is not an
`ExactuneError` is a bug of ours and is never dressed up as the user's mistake.
"""


class ExactuneError(Exception):
    """A mistake or a lack that the user can mend.

    `problem` is one sentence (or a short list) that says what is wrong; `mend` says what to do about it.
    """

    def __init__(self, problem: str, mend: str = ""):
        self.problem = problem
        self.mend = mend
        super().__init__(f"{problem}\n{mend}" if mend else problem)


class ConfigError(ExactuneError, ValueError):
    """An argument, config field or combination of them that cannot be meant."""


class DataError(ExactuneError, ValueError):
    """Rows that cannot be read, or that have nothing to learn."""


class ModelError(ExactuneError, ValueError):
    """A model, adapter or tokenizer that is missing, damaged or of a kind we cannot take."""


class DeviceError(ExactuneError, RuntimeError):
    """Hardware, driver or a library that the request needs and this machine lacks."""


class OutputError(ExactuneError, OSError):
    """Something that could not be written; what was there before is untouched."""


class ArtefactError(ExactuneError, RuntimeError):
    """An artefact that was written and failed its own verification; it was not given its name."""
