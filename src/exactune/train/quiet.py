"""Keeps the chatter of the libraries underneath out of the run's own output, and puts their settings back afterwards."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

# Loggers whose warnings speak of choices this package makes for the user.
_CHATTY = ("accelerate", "peft", "bitsandbytes", "torch.utils.checkpoint", "trl")


@contextmanager
def _level(logger: logging.Logger, level: int) -> Iterator[None]:
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _no_bars() -> Iterator[None]:
    import datasets.utils
    from transformers.utils import logging as transformers_logging

    datasets_had = not datasets.utils.are_progress_bars_disabled()
    transformers_had = transformers_logging.is_progress_bar_enabled()
    datasets.utils.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if datasets_had:
            datasets.utils.enable_progress_bars()
        if transformers_had:
            transformers_logging.enable_progress_bar()


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block, only errors of transformers, TRL and friends are printed, and none of their progress bars."""
    from transformers.utils import logging as transformers_logging

    with ExitStack() as stack:
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        stack.callback(transformers_logging.set_verbosity, verbosity)
        for name in _CHATTY:
            stack.enter_context(_level(logging.getLogger(name), logging.ERROR))
        stack.enter_context(_no_bars())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
        yield
