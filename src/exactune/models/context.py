"""`max_seq_length` and `rope_scaling`: how far the model's positions reach, and how to make them reach further."""

from __future__ import annotations

import logging
from typing import Any

from exactune.errors import ConfigError
from exactune.models.arguments import nearest

logger = logging.getLogger(__name__)

DEFAULT_LENGTH = 2048
_OF_ANY_TYPE = {"rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved"}  # the rest belongs to one type of scaling
_STRETCH = ("linear", "dynamic", "yarn")  # one factor says how much further the positions reach


def set_context(config: Any, max_seq_length: int | None, rope_scaling: dict[str, Any] | None) -> int | None:
    """Merge `rope_scaling` into `config` (in place) and return the longest sequence that may be used, None where nothing limits it.

    2048, the default that scripts copy, gives way with a warning to a model with a shorter reach.

    Raises:
        ConfigError: `rope_scaling` cannot be read, or `max_seq_length` is beyond the model's positions.
    """
    text = config.get_text_config()
    if max_seq_length is not None and (not isinstance(max_seq_length, int) or max_seq_length < 1):
        raise ConfigError(f"max_seq_length={max_seq_length!r} is not a number of tokens.", "Pass a positive whole number.")
    limit = getattr(text, "max_position_embeddings", None)
    if rope_scaling:
        limit = _scale(text, dict(rope_scaling), limit, max_seq_length)
    if not limit or max_seq_length is None:
        return max_seq_length or limit
    if max_seq_length <= limit:
        return int(max_seq_length)
    if max_seq_length == DEFAULT_LENGTH:
        logger.warning("max_seq_length is %d: this model reaches no further.", limit)
        return limit
    scaled = " with this rope_scaling" if rope_scaling else ""
    factor = _factor_for(max_seq_length, limit, rope_scaling)
    raise ConfigError(
        f"max_seq_length={max_seq_length} is beyond the {limit} positions that this model reaches{scaled}.",
        f'Pass max_seq_length={limit} or less, or stretch the positions: rope_scaling={{"rope_type": "yarn", "factor": {factor}}}.',
    )


def _factor_for(length: int, limit: int, rope_scaling: dict[str, Any] | None) -> float:
    """The factor that would do, to the next half."""
    own = limit / float((rope_scaling or {}).get("factor", 1.0))
    return -(-2 * length // own) / 2


def _scale(text: Any, scaling: dict[str, Any], limit: int | None, max_seq_length: int | None) -> int | None:
    """Write `scaling` into the rope parameters of `text`; returns the new reach."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = getattr(text, "rope_parameters", None)
    if not parameters:
        raise ConfigError("rope_scaling was given, and this model has no rotary positions to scale.", "Leave rope_scaling out.")
    if "type" in scaling:  # the name before transformers 5
        scaling.setdefault("rope_type", scaling.pop("type"))
    kind, known = scaling.get("rope_type"), sorted({"default", *ROPE_INIT_FUNCTIONS})
    if kind not in known:
        raise ConfigError(
            f"rope_scaling names the type {kind!r}, which transformers does not know.{nearest(str(kind), known)}",
            f"Use one of {', '.join(known)}.",
        )
    factor = scaling.get("factor")
    if kind in _STRETCH and not (isinstance(factor, (int, float)) and factor >= 1):
        raise ConfigError(f'rope_scaling of type {kind!r} needs a "factor" of at least 1, and got {factor!r}.', 'Pass, say, "factor": 2.0.')
    # Where layers differ, only those that look at everything are stretched: a sliding window never sees far positions.
    by_layer = {name: part for name, part in parameters.items() if isinstance(part, dict)}
    target = by_layer.get("full_attention") or next(iter(by_layer.values()), parameters)
    if kind == "yarn" and limit:
        scaling.setdefault("original_max_position_embeddings", limit)
    if kind != target.get("rope_type"):
        for left_over in target.keys() - _OF_ANY_TYPE:
            del target[left_over]
    target.update(scaling)
    try:
        text.validate_rope()
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"rope_scaling of type {kind!r} is not complete: {error}", "Pass every key that this type needs.") from error
    if not limit:
        return None
    if kind in _STRETCH:
        reach = int(limit * factor)  # type: ignore[operator]
    else:
        reach = max(limit, int(max_seq_length or 0))
    if kind != "dynamic":  # dynamic scaling measures from the original limit, which it reads in this very field
        text.max_position_embeddings = reach
    return reach
