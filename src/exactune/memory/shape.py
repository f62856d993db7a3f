"""A decoder's sizes, from its config alone: no weights, no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exactune.errors import ConfigError

FUSED_PROJECTIONS = ("phi3",)  # one qkv_proj and one gate_up_proj
SANDWICH_NORMS = ("gemma2", "gemma3", "gemma3_text")
HEAD_NORMS = ("qwen3", "gemma3", "gemma3_text")
QKV_BIASES = ("qwen2",)
BY_AUTOGRAD = ("gemma2",)  # softcapped attention: its backend is differentiated by autograd, which keeps q, k, v and the output
PLANNED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "phi3")


@dataclass(frozen=True)
class Shape:
    """E, L, H, K, D, F and V of the legend in docs/design.md, and what else of an architecture takes memory."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    tied: bool = False
    model_type: str = "llama"
    longest: int | None = None  # positions that the model reaches

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The shape that a transformers config (or its dict) describes.

        Raises:
            ConfigError: an architecture whose layers are not the ones that the plan counts.
        """
        if not isinstance(config, Mapping):
            config = config.get_text_config().to_dict()
        config = config.get("text_config") or config
        kind = config.get("model_type", "")
        if kind not in PLANNED:
            raise ConfigError(
                f"The memory of a {kind or 'nameless'} model cannot be planned: its layers are not made of the parts that are counted.",
                f"Use use_gradient_checkpointing=True or False for it; planned are {', '.join(PLANNED)}.",
            )
        heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            inner=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", kind.startswith("gemma"))),
            model_type=kind,
            longest=config.get("max_position_embeddings"),
        )

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def sandwich(self) -> bool:
        return self.model_type in SANDWICH_NORMS

    @property
    def head_norms(self) -> bool:
        return self.model_type in HEAD_NORMS

    @property
    def groups(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each group of projections that read one input."""
        E, F = self.hidden, self.inner
        return {"qkv": (self.qkv_width, E), "out": (E, self.q_width), "gate_up": (2 * F, E), "down": (E, F)}

    @property
    def projections(self) -> dict[str, list[tuple[str, int, int]]]:
        """(name, outputs, inputs) of the projections of each group."""
        kv, E, F = self.kv_heads * self.head_dim, self.hidden, self.inner
        if self.model_type in FUSED_PROJECTIONS:
            qkv, gate_up = [("qkv_proj", self.qkv_width, E)], [("gate_up_proj", 2 * F, E)]
        else:
            qkv = [("q_proj", self.q_width, E), ("k_proj", kv, E), ("v_proj", kv, E)]
            gate_up = [("gate_proj", F, E), ("up_proj", F, E)]
        return {"qkv": qkv, "out": [("o_proj", E, self.q_width)], "gate_up": gate_up, "down": [("down_proj", E, F)]}

    @property
    def linear_weights(self) -> int:
        """Weights of one layer's projections."""
        return sum(outputs * inputs for outputs, inputs in self.groups.values())

    @property
    def other_weights(self) -> int:
        """Embedding, head, norms and biases of the whole model."""
        norms = (4 if self.sandwich else 2) * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        biases = self.qkv_width if self.model_type in QKV_BIASES else 0
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.layers * (norms + biases) + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.linear_weights + self.other_weights
