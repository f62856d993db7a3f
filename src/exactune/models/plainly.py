"""What transformers raises about a user's mistake, said in one sentence with its mend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from exactune.errors import ConfigError, DeviceError, ExactuneError, ModelError


@contextlib.contextmanager
def said_plainly(name: str) -> Iterator[None]:
    """Turn what transformers raises about a user's mistake into one sentence and a mend; anything else passes through."""
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"{name} does not fit into the memory of this GPU.", "Pass load_in_4bit=True, or use a smaller model.") from error
    except SafetensorError as error:
        raise ModelError(f"The weights of {name} are damaged ({error}).", "Download or copy them again.") from error
    except ImportError as error:
        raise DeviceError(f"Loading {name} needs a library that is not installed: {first_line(error)}", "Install it with pip.") from error
    except OSError as error:
        raise _missing(name, error) from error
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        argument = str(error).rpartition("argument ")[2]
        raise ConfigError(
            f"Neither Exactune nor transformers knows the argument {argument}.", "Check its spelling, or leave it out."
        ) from error
    except ValueError as error:
        if not isinstance(error, ExactuneError) and _is_about_the_model(str(error)):
            raise ModelError(f"{name} cannot be loaded: {first_line(error)}", _mend_for(str(error))) from error
        raise


_UNKNOWN_KIND = ("does not recognize this architecture", "Unrecognized configuration class", "Unrecognized model")
_REMOTE_CODE = "trust_remote_code"
_TOO_BIG = "dispatched on the CPU or the disk"


def _is_about_the_model(message: str) -> bool:
    return any(sign in message for sign in (*_UNKNOWN_KIND, _REMOTE_CODE, _TOO_BIG))


def _mend_for(message: str) -> str:
    if _REMOTE_CODE in message:
        return "It brings Python code of its own. If you have read that code and trust it, pass trust_remote_code=True."
    if _TOO_BIG in message:
        return "It does not fit into the GPU's memory. Pass load_in_4bit=True, or use a smaller model."
    return "Use a decoder-only language model that this version of transformers knows."


def _missing(name: str, error: OSError) -> ModelError:
    """The one thing that is wrong when transformers cannot find a model."""
    message = str(error)
    if Path(name).expanduser().is_dir():
        return ModelError(f"{name} cannot be loaded: {first_line(error)}", "Save or download the model again.")
    if "gated" in message or "401" in message or "403" in message:
        return ModelError(f"{name} is gated or private on the hub.", "Accept its licence there and pass token=..., or run `hf auth login`.")
    if "is not a valid model identifier" in message or "404" in message:
        return ModelError(
            f"There is no folder {name!r} here, and no model of that name on the hub.",
            "Check the spelling, or pass the folder's full path.",
        )
    return ModelError(
        f"There is no folder {name!r} here, and the hub cannot be reached to look for a model of that name.",
        "Check the path; or go online once, so that the model is kept in the local cache (and unset HF_HUB_OFFLINE if it is set).",
    )


def first_line(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:300]
