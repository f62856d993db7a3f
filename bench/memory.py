"""Memory on this GPU: the curve of speed against memory, the longest contexts under a cap, predictions against measurements.

    python bench/memory.py --model DIR --what curve     [--bits 16 4] [--out results.jsonl] [--plot curve.png]
    python bench/memory.py --model DIR --what contexts  [--host 100GiB]
    python bench/memory.py --model DIR --what table     [--small DIR_OF_A_SMALLER_MODEL]
    python bench/memory.py --model DIR --what full      (full fine-tuning at 1 x 4096: 8-bit AdamW in the backward, and stock)

Each measurement is a process of its own with the allocator capped at its budget (`set_per_process_memory_fraction`), so that a plan
that needs more fails. Printed beside each: predicted and measured peak, reserved memory and the gap that fragments leave, tokens/s.
The peers' points (Unsloth, Liger, HF + PEFT) are drawn from `PEERS`, measured under the same conditions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

GIB = 1 << 30
BUDGETS = {"16": (17.2, 17.7, 19, 21, 24, 28, 33, 38, 45), "4": (7.8, 8, 9, 10, 12, 15, 20, 25, 30, 35)}
CONTEXTS = ((12, 81_920), (24, 262_144))
# (bits, kind, GiB, tokens/s) at 4 x 2,048, r = 16, one H200; gradient checkpointing and without.
PEERS = (
    ("16", "HF+PEFT", 31.3, 7928), ("16", "HF+PEFT", 82.4, 11031), ("16", "HF+Liger", 19.7, 9452), ("16", "HF+Liger", 58.6, 13207),
    ("16", "Unsloth", 17.7, 11313), ("16", "Unsloth", 45.8, 16027), ("4", "HF+PEFT", 21.7, 8391), ("4", "HF+Liger", 9.35, 10265),
    ("4", "Unsloth", 8.05, 11131), ("4", "Unsloth", 36.1, 15854),
)  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder (make_random_llama.py writes one)")
    parser.add_argument("--small", help="folder of a smaller model, for the table")
    parser.add_argument("--what", choices=["curve", "contexts", "table", "full"], default="curve")
    parser.add_argument("--bits", nargs="+", default=["16", "4"], choices=["16", "4"])
    parser.add_argument("--host", default="100GiB", help="host memory to use")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, help="append the results here, one JSON line each")
    parser.add_argument("--plot", type=Path, help="draw the curve here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def load(setting: dict):
    """The model of one setting, with adapters or whole, accelerated."""
    import torch
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
    if not setting.get("full"):
        linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        torch.manual_seed(3407)
        model = get_peft_model(model, LoraConfig(r=setting["r"], lora_alpha=setting["r"], target_modules=linears, task_type="CAUSAL_LM"))
    model.train()
    if setting.get("stock"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        return model
    from exactune import accelerate

    print(accelerate(model, cuda_graphs=False).summary(), file=sys.stderr)
    return model


def planned(model, setting: dict):
    """The plan of a setting, in force: the one that is named, or the fastest for the budget."""
    from dataclasses import replace

    from exactune.memory.budget import parse_bytes
    from exactune.memory.mends import too_large
    from exactune.memory.phases import Step
    from exactune.memory.plan import Plan, choose
    from exactune.memory.policy import policies
    from exactune.memory.shape import Shape
    from exactune.models.memory import apply_plan, job_of

    job = job_of(model, optim="adamw_torch_fused")
    if setting.get("full"):
        job = replace(job, optim="adamw_8bit", in_backward=True)
    step = Step(Shape.of(model.config), job, setting["rows"], setting["tokens"])
    if setting.get("policy"):
        plan = Plan(step, (policies()[setting["policy"]],) * step.shape.layers)
    else:
        budget, host = parse_bytes(setting["gib"]), parse_bytes(setting["host"])
        plan = choose(step, budget, host)
        if plan is None:
            raise too_large(step, budget, host)
    apply_plan(model, plan)
    return plan


def optimizer_of(model, setting: dict):
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    if not setting.get("full"):
        return torch.optim.AdamW(trained, lr=2e-4, fused=True)
    if setting.get("stock"):
        return torch.optim.AdamW(trained, lr=1e-5, fused=True)
    from bitsandbytes.optim import AdamW8bit

    from exactune.memory.in_backward import StepInBackward

    return StepInBackward(trained, lambda p: AdamW8bit(p, lr=1e-5))


def batch_of(setting: dict, generator):
    """Random rows; a packed setting has documents of 700 tokens and the last one shorter."""
    import torch

    rows, tokens = setting["rows"], setting["tokens"]
    ids = torch.randint(5, 32000, (rows, tokens), generator=generator, device="cuda")
    if not setting.get("packed"):
        return {"input_ids": ids, "labels": ids}
    edges = torch.tensor([*range(0, tokens, 700), tokens], dtype=torch.int32, device="cuda")
    positions = torch.cat([torch.arange(n, device="cuda") for n in edges.diff().tolist()])[None]
    lengths = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 700, "max_length_k": 700}
    return {"input_ids": ids, "labels": ids, "position_ids": positions, **lengths}


def measure(setting: dict) -> dict:
    """A few steps under the cap: predicted and measured peak, reserved memory, tokens/s, the losses."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    model = load(setting)
    plan = None if setting.get("stock") else planned(model, setting)
    if setting.get("gib"):
        torch.cuda.set_per_process_memory_fraction(min(1.0, float(setting["gib"]) * GIB / total))
    optimizer = optimizer_of(model, setting)
    torch.cuda.empty_cache()
    generator = torch.Generator(device="cuda").manual_seed(1)
    times, losses = [], []
    for i in range(setting["steps"] + 2):
        batch = batch_of(setting, generator)
        if i == 2:
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
    peak, reserved = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    seconds = statistics.median(times[2:])
    found = {
        "tokens_s": round(setting["rows"] * setting["tokens"] / seconds), "ms": round(seconds * 1e3, 1), "peak_gib": round(peak, 3),
        "reserved_gib": round(reserved, 3), "gap": round(reserved / peak - 1, 4), "losses": losses,
    }  # fmt: skip
    if plan is not None:
        predicted = {"predicted_gib": round(plan.peak / GIB, 3), "off": round(plan.peak / GIB / peak - 1, 4), "plan": plan.summary()}
        found |= predicted | {"predicted_ms": round(plan.seconds * 1e3, 1), "host_gib": round(plan.host / GIB, 2)}
    return found


def settings_of(args: argparse.Namespace) -> list[dict]:
    base = {"model": args.model, "host": args.host, "steps": args.steps, "r": 16, "rows": 4, "tokens": 2048}
    if args.what == "curve":
        return [base | {"bits": bits, "gib": gib} for bits in args.bits for gib in BUDGETS[bits]]
    if args.what == "contexts":
        return [base | {"bits": "4", "gib": gib, "rows": 1, "tokens": tokens, "r": 32, "steps": 1} for gib, tokens in CONTEXTS]
    if args.what == "full":
        full = base | {"bits": "16", "full": True, "rows": 1, "tokens": 4096}
        return [full | {"gib": 40}, full | {"stock": True}]
    found = []
    for model in filter(None, (args.model, args.small)):
        for bits in args.bits:
            sized = base | {"model": model, "bits": bits}
            found += [sized | {"policy": policy} for policy in ("keep", "layer", "mlp+all")]
            found.append(sized | {"policy": "layer+all", "rows": 1, "tokens": 16384})
            found.append(sized | {"policy": "mlp", "rows": 1, "tokens": 8192, "packed": True})
    return found


def run_worker(setting: dict) -> dict:
    """One setting in a process of its own."""
    done = subprocess.run([sys.executable, *sys.argv, "--worker", json.dumps(setting)], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    return json.loads(lines[-1])


def title_of(setting: dict) -> str:
    cap = f" under {setting['gib']} GiB" if setting.get("gib") else ""
    kind = " full, stock" if setting.get("stock") else " full" if setting.get("full") else f" r={setting['r']}"
    shape = f"{setting['rows']}x{setting['tokens']}{' packed' if setting.get('packed') else ''}"
    return f"{Path(setting['model']).name} {setting['bits']}-bit {shape}{kind} {setting.get('policy', '')}{cap}"


def draw(results: list[dict], path: Path) -> None:
    """tokens/s against the measured peak, with the peers' points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, bits in zip(axes, ("16", "4")):
        mine = sorted((r["peak_gib"], r["tokens_s"]) for r in results if r["setting"]["bits"] == bits and "tokens_s" in r)
        axis.plot(*zip(*mine), "o-", label="Exactune") if mine else None
        for kind, mark in (("HF+PEFT", "s"), ("HF+Liger", "^"), ("Unsloth", "D")):
            points = [(gib, speed) for b, k, gib, speed in PEERS if (b, k) == (bits, kind)]
            axis.plot(*zip(*points), mark, label=kind)
        axis.set(title="NF4" if bits == "4" else "16 bits", xlabel="peak allocated, GiB")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("tokens/s")
    axes[0].legend()
    figure.suptitle("Llama-3.1-8B shape, LoRA r = 16, 4 x 2,048 tokens")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    args = arguments()
    if args.worker:
        print(json.dumps(measure(json.loads(args.worker))))
        return
    sys.path.insert(0, str(Path(__file__).parent))
    from train import provenance

    about, results = provenance(), []
    print(f"{'':60} {'tokens/s':>9} {'ms':>8} {'predicted':>10} {'peak':>7} {'off':>7} {'reserved':>9} {'gap':>6}")
    for setting in settings_of(args):
        result = run_worker(setting) | {"setting": setting, "title": title_of(setting)}
        results.append(result)
        if "error" in result:
            print(f"{result['title']:60} {result['error']}", flush=True)
        else:
            predicted, off = result.get("predicted_gib", float("nan")), result.get("off", float("nan"))
            numbers = f"{result['tokens_s']:9} {result['ms']:8.1f} {predicted:10.2f} {result['peak_gib']:7.2f} {off:7.1%}"
            print(f"{result['title']:60} {numbers} {result['reserved_gib']:9.2f} {result['gap']:6.1%}", flush=True)
            print(f"    {result.get('plan', '')}", flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps({**result, **about}) + "\n")
    if args.plot:
        draw(results, args.plot)


if __name__ == "__main__":
    main()
