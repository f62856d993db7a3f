"""Every decoder-only model type that transformers registers: what exactune makes fast in it, and how exact that is.

    python scripts/model_table.py               all types, written to docs/models.json and docs/models.md
    python scripts/model_table.py llama gemma2  these only, printed

Each type is built tiny and random, with LoRA on every linear layer, in float64 on the CPU, where the reference path computes; stock and
accelerated model then take the same training step. The stock norms compute in float32 whatever the dtype, which sets how close two
runs can be.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import warnings
from typing import Any

import torch

from model_page import DOCS, all_fused, passed, write

SHAPE = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {
    "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "router_aux_loss_coef": 0.0,
}  # fmt: skip
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "head_dim": 8}
FULL = {"layer_types": ["full_attention"] * 2}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
ATTEMPTS: tuple[dict[str, Any], ...] = (
    {}, EXPERTS, {**EXPERTS, **LATENT}, {"head_dim": None}, {**EXPERTS, "head_dim": None}, HYBRID,
    {**EXPERTS, **HYBRID}, {**EXPERTS, **FULL},
)  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "gptj": {"rotary_dim": 8, "head_dim": None},
    "codegen": {"rotary_dim": 8, "head_dim": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "mistral": {"sliding_window": 16},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 16, "attn_implementation": "eager"},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_text": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 160, "global_head_dim": 16, "num_kv_shared_layers": 0},
    "gpt_oss": {**EXPERTS, "sliding_window": 16, "attn_implementation": "eager"},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, **EXPERTS, "mamba_d_state": 4},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, **EXPERTS},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {
        **EXPERTS, **HYBRID, "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "qwen3_5_text": {
        **HYBRID, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "qwen3_5_moe_text": {
        **EXPERTS, **HYBRID, "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "nemotron_h": {"head_dim": 16, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, **EXPERTS},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
}  # fmt: skip


class Unbuildable(Exception):
    """A model type that no tiny config builds; the message says why."""


def model_types() -> list[str]:
    """The types registered for causal LM, alphabetically."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def why_not_decoder_only(config: Any) -> str:
    """The reason why a type does not belong in the table, or ""."""
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder's decoder"
    return "" if config.get_text_config() is config else "several modalities in one"


@torch.no_grad()
def looks_ahead(model: Any) -> bool:
    """True where a token's logits change with a later token: an encoder."""
    ids = batch()["input_ids"][:1]
    later = torch.cat([ids[:, :-1], ids[:, -1:] + 1], 1)
    a, b = (model(input_ids=x, use_cache=False).logits[:, :-1] for x in (ids, later))
    return not torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def tiny_model(model_type: str) -> Any:
    """A random model of this type in float64 under a tiny config, without dropout; the same at every call.

    Raises:
        Unbuildable: no attempt gives a model of fewer than 3 million parameters that computes a loss.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    why = ""
    for attempt in (OWN[model_type],) if model_type in OWN else ATTEMPTS:
        settings = {k: v for k, v in {**SHAPE, **attempt}.items() if v is not None}
        attention = settings.pop("attn_implementation", "sdpa")
        try:
            config = AutoConfig.for_model(model_type, **settings)
            if outside := why_not_decoder_only(config):
                raise Unbuildable(outside)
            _without_dropout(config)
            config._experts_implementation = "eager"  # torch's grouped GEMM has no float64
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config, attn_implementation="eager").parameters())
            if size > 3e6:
                raise ValueError(f"{size / 1e6:.0f}M parameters even when tiny")
            model = _build(config, attention)
            if looks_ahead(model):
                raise Unbuildable("an encoder used as a decoder")
            if not torch.isfinite(model(**batch()).loss):
                raise ValueError("a loss that is no number")
            return model
        except Unbuildable:
            raise
        except Exception as error:  # whatever a foreign config or model raises under settings that do not suit it
            why = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:100]}"
    raise Unbuildable(why)


def _build(config: Any, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except (ValueError, ImportError):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.double()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, *((0.0, 0.1) if name.endswith(("bias", "sinks")) else (0.5, 0.3)))
    return model


def _without_dropout(config: Any) -> None:
    for name, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in name or "pdrop" in name or "drop_rate" in name or "jitter" in name):
            setattr(config, name, 0.0)


def with_lora(model: Any) -> Any:
    """The model with random adapters on every linear layer that PEFT takes, in training mode."""
    from peft import LoraConfig, get_peft_model

    head = model.get_output_embeddings()
    named = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and m is not head]
    if hasattr(model.config, "mamba_d_ssm") or "mamba" in model.config.model_type:
        named = [n for n in named if not n.endswith("out_proj")]  # PEFT refuses it: the kernels read that weight themselves
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=named or "all-linear"))
    torch.manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = torch.nn.init.normal_(parameter.data.double(), 0, 0.1)
    return peft.train()


def batch() -> dict[str, torch.Tensor]:
    """Two rows of 40 random ids with labels, a masked prompt in the first."""
    ids = torch.randint(5, 150, (2, 40), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :7] = -100
    return {"input_ids": ids, "labels": labels}


def step(model: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(loss, logits, the gradient of every trained parameter that has one)."""
    model.zero_grad()
    torch.manual_seed(2)
    out = model(**batch(), use_cache=False)
    out.loss.backward()
    return out.loss.detach(), out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def tokens(model: Any) -> torch.Tensor | None:
    """What the model generates after a short prompt; None where it cannot."""
    model.eval()
    try:
        return model.generate(input_ids=batch()["input_ids"][:, :9], max_new_tokens=8, do_sample=False)
    except Exception:  # a type may not know how to generate under a tiny config; then there is nothing to compare
        return None
    finally:
        model.train()


def error(a: torch.Tensor, b: torch.Tensor, floor: float = 1e-12) -> float:
    """‖a - b‖ / (‖b‖ + floor)."""
    return ((a - b).norm() / (b.norm() + floor)).item()


def examine(model_type: str) -> dict[str, Any]:
    """One row of the table.

    Raises:
        Unbuildable: there is no tiny model of this type.
    """
    from exactune.models.accelerate import accelerate, undo

    model = with_lora(tiny_model(model_type))
    twin = copy.deepcopy(model)
    loss, logits, grads = stock = step(model)
    said = tokens(model)
    report = accelerate(model)
    fast_loss, fast_logits, fast_grads = step(model)
    fast_said = tokens(model)
    undo(model)
    again = step(model)
    same_names = grads.keys() == fast_grads.keys()
    worst = max(error(fast_grads[n], grads[n], 1e-6 * _scale(grads)) for n in grads) if same_names else float("inf")
    undone = _same(stock, again) and all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values()))
    stock_parts: dict[str, list[str]] = {}
    for part in report.parts:
        if not part.fused:
            stock_parts.setdefault(part.kind, []).append(part.reason)
    return {
        "type": model_type,
        "layers": f"{report.fused_layers}/{report.layers}",
        **{kind: "{}/{}".format(*report.count(kind)) for kind in ("attention", "mlp", "norm", "projection")},
        "head": report.head,
        "loss": error(fast_loss, loss),
        "logits": error(fast_logits, logits),
        "gradients": worst,
        "undo": undone,
        "generate": None if said is None else fast_said is not None and torch.equal(said, fast_said),
        "stock": {kind: sorted(set(reasons)) for kind, reasons in stock_parts.items()},
        "stock_calls": dict(report.stock_calls),
    }


def _scale(grads: dict[str, torch.Tensor]) -> float:
    """The norm of all gradients as one vector: below its millionth, a gradient is rounding and nothing else."""
    return sum(g.square().sum().item() for g in grads.values()) ** 0.5


def _same(a: tuple, b: tuple) -> bool:
    return bool(a[0] == b[0]) and torch.equal(a[1], b[1]) and all(torch.equal(a[2][n], b[2][n]) for n in a[2])


def census(types: list[str]) -> dict[str, Any]:
    """The table: a row for each type that builds, and why the others do not."""
    import transformers

    rows, left_out, failed = [], {}, {}
    for model_type in types:
        try:
            rows.append(examine(model_type))
        except Unbuildable as why:
            left_out[model_type] = str(why)
            print("left out", model_type, why, flush=True)
            continue
        except Exception as why:  # one type that breaks must not hide the others
            failed[model_type] = f"{type(why).__name__}: {str(why)[:200]}"
            print("BROKEN", model_type, failed[model_type], flush=True)
            continue
        row = rows[-1]
        mark = "ok " if passed(row) else "BAD"
        print(mark, "all" if all_fused(row) else "   ", json.dumps(row), flush=True)
    return {"transformers": transformers.__version__, "torch": torch.__version__, "rows": rows, "left_out": left_out, "failed": failed}


def main() -> None:
    """Run the census."""
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all that are registered if none is named")
    asked = parser.parse_args().types
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    found = census(asked or model_types())
    if not asked:
        (DOCS / "models.json").write_text(json.dumps(found, indent=1) + "\n")
        write()


if __name__ == "__main__":
    main()
