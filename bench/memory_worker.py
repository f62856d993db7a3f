"""Measures settings of one model after another in one process: reads them as JSON from stdin, prints one JSON line each.

Started by memory.py. Loading and proving take most of a process's life; between two settings the adapters, the optimizer and the
allocator's cache are as they were at first, so each is measured as if it were alone.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from dataclasses import replace

import torch

GIB = 1 << 30
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(setting: dict):
    """The model that a setting names, with adapters or whole, accelerated or stock."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    quantised = {"quantization_config": nf4} if setting["bits"] == "4" else {}
    model = AutoModelForCausalLM.from_pretrained(
        setting["model"], dtype=torch.bfloat16, device_map={"": 0}, attn_implementation="sdpa", **quantised
    )
    model.config.use_cache = False
    if not setting["full"]:
        torch.manual_seed(3407)
        config = LoraConfig(r=setting["r"], lora_alpha=setting["r"], target_modules=LINEARS, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    model.train()
    if setting["stock"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        return model
    from exactune import accelerate

    print(accelerate(model, cuda_graphs=setting["graphs"]).summary(), file=sys.stderr)
    return model


def planned(model, setting: dict):
    """The plan of a setting, in force: the policy that it names, or the fastest plan for its budget."""
    from exactune.memory.budget import parse_bytes
    from exactune.memory.mends import chosen
    from exactune.memory.phases import Step
    from exactune.memory.plan import Plan
    from exactune.memory.policy import policies
    from exactune.memory.shape import Shape
    from exactune.models.memory import apply_plan, job_of

    job = job_of(model, optim="adamw_torch_fused")
    if setting["full"]:
        job = replace(job, optim="adamw_8bit", in_backward=True)
    step = Step(Shape.of(model.config), job, setting["rows"], setting["tokens"])
    if setting["policy"]:
        step = replace(step, alone=setting["graphs"])  # there is only one shape of passes here
        plan = Plan(step, (policies()[setting["policy"]],) * step.shape.layers)
    else:
        plan = chosen(step, parse_bytes(setting["gib"]), parse_bytes(setting["host"]))
    apply_plan(model, plan)
    return plan


def optimizer_of(model, setting: dict):
    trained = [p for p in model.parameters() if p.requires_grad]
    if not setting["full"]:
        return torch.optim.AdamW(trained, lr=2e-4, fused=True)
    if setting["stock"]:
        return torch.optim.AdamW(trained, lr=1e-5, fused=True)
    from bitsandbytes.optim import AdamW8bit, GlobalOptimManager

    from exactune.memory.in_backward import StepInBackward

    # As transformers' trainer has it: the embedding's state stays in 32 bits.
    GlobalOptimManager.get_instance().register_module_override(model.get_input_embeddings(), "weight", {"optim_bits": 32})
    return StepInBackward(trained, lambda parameters: AdamW8bit(parameters, lr=1e-5))


def batch_of(setting: dict, generator) -> dict:
    """Random rows; a packed setting has documents of 700 tokens and the last one shorter."""
    rows, tokens = setting["rows"], setting["tokens"]
    ids = torch.randint(5, 32000, (rows, tokens), generator=generator, device="cuda")
    if not setting["packed"]:
        return {"input_ids": ids, "labels": ids}
    edges = torch.tensor([*range(0, tokens, 700), tokens], dtype=torch.int32, device="cuda")
    positions = torch.cat([torch.arange(n, device="cuda") for n in edges.diff().tolist()])[None]
    lengths = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 700, "max_length_k": 700}
    return {"input_ids": ids, "labels": ids, "position_ids": positions, **lengths}


def train(model, optimizer, setting: dict) -> tuple[list[float], list[float]]:
    """(seconds, losses) of the measured steps, after `warm_up` that are not; peaks are counted from the first measured one."""
    generator = torch.Generator(device="cuda").manual_seed(1)
    times, losses = [], []
    for i in range(setting["warm_up"] + setting["steps"]):
        batch = batch_of(setting, generator)
        if i == setting["warm_up"]:
            if setting["graphs"]:
                torch.cuda.empty_cache()  # of the passes before the recording, which do not come again
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.time()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.time() - start)
        losses.append(round(float(loss.detach()), 6))
    return times[setting["warm_up"] :], losses


def measure(model, setting: dict) -> dict:
    """Predicted and measured peak, reserved memory, tokens/s, the losses: under the setting's cap."""
    total = torch.cuda.get_device_properties(0).total_memory
    plan = None if setting["stock"] else planned(model, setting)
    optimizer = optimizer_of(model, setting)
    if setting["gib"]:
        torch.cuda.set_per_process_memory_fraction(min(1.0, float(setting["gib"]) * GIB / total))
    if not setting["warm_up"]:  # a step of minutes is taken once; a short one before it compiles the kernels
        train(model, optimizer, setting | {"tokens": 4096, "steps": 1})
    times, losses = train(model, optimizer, setting)
    peak, reserved = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    if plan is not None and plan.step.recorded(plan.layers):
        peak = reserved  # what is recorded is allocated by nobody, and there all the same
    seconds = statistics.median(times)
    found = {
        "tokens_s": round(setting["rows"] * setting["tokens"] / seconds), "ms": round(seconds * 1e3, 1), "peak_gib": round(peak, 3),
        "reserved_gib": round(reserved, 3), "gap": round(reserved / peak - 1, 4), "losses": losses,
    }  # fmt: skip
    if plan is not None:
        predicted = {"predicted_gib": round(plan.peak / GIB, 3), "off": round(plan.peak / GIB / peak - 1, 4), "plan": plan.summary()}
        phases = {name: round(value / GIB, 3) for name, value in (plan.fixed | plan.phases).items() if value}
        found |= predicted | {"predicted_ms": round(plan.seconds * 1e3, 1), "host_gib": round(plan.host / GIB, 2), "phases": phases}
    passes = _passes_of(model)
    if passes is not None:
        found["recorded"] = {"passes": len(passes), "refused": dict(passes.refused)}
    return found


def _passes_of(model):
    """What is recorded of an accelerated model."""
    from exactune.models.accelerate import report_of

    report = report_of(model)
    return report and report.passes


def as_at_first(model, adapters: dict) -> None:
    """The model's adapters as they were loaded, nothing else of a setting left on the GPU."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.grad = None
            if name in adapters:
                parameter.copy_(adapters[name])
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)


def main() -> None:
    settings = json.loads(sys.stdin.read())
    began = time.time()
    model = load(settings[0])
    load_s = round(time.time() - began, 1)
    adapters = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad and not settings[0]["full"]}
    for setting in settings:
        as_at_first(model, adapters)
        began = time.time()
        try:
            found = measure(model, setting)
        except Exception as error:  # the next setting may do: what failed is told
            found = {"error": f"{type(error).__name__}: {str(error).strip()[:400]}"}
        print(json.dumps(found | {"load_s": load_s, "wall_s": round(time.time() - began, 1)}), flush=True)


if __name__ == "__main__":
    main()
