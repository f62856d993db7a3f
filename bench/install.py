"""How long `accelerate` takes on a model of random weights, first (kernels compile) and again (they are there), and where the time goes.

python bench/install.py llama-8b qwen3-moe --lora
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from pathlib import Path
from typing import Any

import torch

from exactune.models.accelerate import accelerate, undo

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-8b": (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    ),
    "qwen3-moe": (
        "qwen3_moe",
        {
            "hidden_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
            "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "intermediate_size": 6144,
        },
    ),
    "gpt-oss": (
        "gpt_oss",
        {
            "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 2, "num_attention_heads": 64, "num_key_value_heads": 8,
            "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4,
        },
    ),
}  # fmt: skip
EXPERTS = {"qwen3_moe": "mlp.experts", "gpt_oss": "mlp.experts"}


def build(name: str, device: str, *, lora: bool) -> Any:
    """The model in bfloat16 with small random weights, and adapters on every linear layer and expert if asked for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, shape = SHAPES[name]
    config = AutoConfig.for_model(kind, vocab_size=32000, **shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    rotary = type(model.model.rotary_emb)(config)
    model = model.to_empty(device=device)
    model.model.rotary_emb = rotary.to(device)  # its frequencies are no weights, and would be left empty
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02 if parameter.dim() > 1 else 0.5)
    if not lora:
        return model.requires_grad_(False)
    from peft import LoraConfig, get_peft_model

    fused = [f"{EXPERTS[kind]}.{which}" for which in ("gate_up_proj", "down_proj")] if kind in EXPERTS else None
    linear = ["q_proj", "k_proj", "v_proj", "o_proj"] + ([] if fused else ["gate_proj", "up_proj", "down_proj"])
    return get_peft_model(model, LoraConfig(r=16, target_modules=linear, target_parameters=fused))


def installed_in(model: Any) -> tuple[float, str]:
    """Seconds of one `accelerate`, and its summary; the model is stock again afterwards."""
    _settle()
    start = time.perf_counter()
    report = accelerate(model)
    _settle()
    seconds = time.perf_counter() - start
    undo(model)
    return seconds, report.summary()


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def where(model: Any, most: int) -> list[tuple[float, int, str]]:
    """(cumulative seconds, calls, name) of the functions of exactune's that take longest, profiled."""
    profile = cProfile.Profile()
    profile.runcall(installed_in, model)
    rows = []
    for (path, _, function), (_, calls, _, cumulative, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if "exactune" in Path(path).parts:
            rows.append((cumulative, calls, f"{Path(path).stem}.{function}"))
    return sorted(rows, reverse=True)[:most]


def main() -> None:
    """Time each model that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", choices=SHAPES, default=["llama-8b"])
    parser.add_argument("--lora", action="store_true", help="adapters on every linear layer and on the experts")
    parser.add_argument("--rows", type=int, default=24, help="lines of the profile")
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in asked.shapes:
        model = build(name, device, lora=asked.lora)
        first, summary = installed_in(model)
        again = min(installed_in(model)[0] for _ in range(2))
        print(f"{name}: first {first:.2f} s, again {again:.2f} s; {summary}", flush=True)
        for seconds, calls, function in where(model, asked.rows):
            print(f"  {seconds:7.2f} s {calls:5d} x {function}", flush=True)
        del model


if __name__ == "__main__":
    main()
