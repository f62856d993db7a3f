"""Every decoder-only model type that transformers registers: what exactune makes fast in it, and how exact that is.

    python scripts/model_table.py                      all types on the CPU, written to docs/models.json and docs/models.md
    python scripts/model_table.py llama gemma2         these only, printed
    python scripts/model_table.py --device cuda --jobs 8 --out models-cuda.json

Each type is built tiny and random, with LoRA on every linear layer; stock and accelerated model then take the same training steps.
On the CPU that is in float64, where the reference path computes (the stock norms compute in float32 whatever the dtype, which sets how
close two runs can be). On a GPU it is in float32 and in bfloat16, through the kernels, and both are held against a stock model in the
next wider dtype, on several batches.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import multiprocessing
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model_page import CLOSE, DOCS, STOCK_FAILS, all_fused, passed, write
from tiny_types import Unbuildable, batches, keeps_rows_apart, model_types, tiny_model, whole_rows, with_lora

Step = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
KINDS = ("attention", "recurrent", "mlp", "experts", "norm", "projection")
DRAWS = 15  # batches on a GPU
GPU_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def step(model: Any, inputs: dict[str, torch.Tensor]) -> Step:
    """(loss, logits, the gradient of every trained parameter that has one)."""
    model.zero_grad()
    torch.manual_seed(2)
    dtype, device = model.dtype, model.device
    with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
        out = model(**{name: t.to(device) for name, t in inputs.items()}, use_cache=False)
    out.loss.backward()
    return out.loss.detach(), out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def tokens(model: Any) -> torch.Tensor | None:
    """What the model generates after a short prompt; None where it cannot."""
    model.eval()
    try:
        prompt = batches()["whole"]["input_ids"][:, :9].to(model.device)
        return model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)
    except Exception:  # a type may not know how to generate under a tiny config; then there is nothing to compare
        return None
    finally:
        model.train()


def error(a: torch.Tensor, b: torch.Tensor, floor: float = 1e-12) -> float:
    """‖a - b‖ / (‖b‖ + floor)."""
    return ((a.double() - b.double()).norm() / (b.double().norm() + floor)).item()


def _scale(grads: dict[str, torch.Tensor]) -> float:
    """The norm of all gradients as one vector: below its millionth, a gradient is rounding and nothing else."""
    return sum(g.double().square().sum().item() for g in grads.values()) ** 0.5


def furthest(step: Step, truth: Step) -> dict[str, float]:
    """The error of the loss, of the logits, and the largest of any gradient."""
    same_names = step[2].keys() == truth[2].keys()
    worst = max(error(step[2][n], g, 1e-6 * _scale(truth[2])) for n, g in truth[2].items()) if same_names else float("inf")
    return {"loss": error(step[0], truth[0]), "logits": error(step[1], truth[1]), "gradients": worst}


def overall(step: Step, truth: Step) -> dict[str, float]:
    """The error of the logits, and of all gradients as one vector: what rounding can be judged by."""
    if step[2].keys() != truth[2].keys():
        return {"logits": float("inf"), "gradients": float("inf")}
    difference = {name: step[2][name].double() - g.double() for name, g in truth[2].items()}
    return {"logits": error(step[1], truth[1]), "gradients": _scale(difference) / _scale(truth[2])}


def _same(a: Step, b: Step) -> bool:
    return bool(a[0] == b[0]) and torch.equal(a[1], b[1]) and all(torch.equal(a[2][n], b[2][n]) for n in a[2])


def _attempt(model: Any, inputs: dict[str, torch.Tensor]) -> Step | None:
    try:
        found = step(model, inputs)
    except Exception:  # not every type takes every kind of batch; what the stock model refuses is not compared
        return None
    return found if found[1].isfinite().all() else None  # eager attention makes NaN of rows that are all padding


def examine_on_cpu(model_type: str) -> dict[str, Any]:
    """One row of the table.

    Raises:
        Unbuildable: there is no tiny model of this type.
    """
    from exactune.models.accelerate import accelerate, undo

    model = with_lora(tiny_model(model_type))
    twin = copy.deepcopy(model)
    stock = {name: _attempt(model, inputs) for name, inputs in batches().items()}
    if not keeps_rows_apart(model):
        stock["packed"] = None  # ours are apart, so there is nothing to compare with
    said = tokens(model)
    report = accelerate(model)
    fast = {name: step(model, inputs) for name, inputs in batches().items() if stock[name] is not None}
    fast_said = tokens(model)
    undo(model)
    again = step(model, batches()["whole"])
    whole = stock["whole"]
    assert whole is not None, "tiny_model has computed a loss"
    undone = _same(whole, again) and all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values()))
    others = {name: max(furthest(fast[name], was).values()) if was else None for name, was in stock.items() if name != "whole"}
    return {
        "type": model_type,
        **_parts(report),
        **furthest(fast["whole"], whole),
        **others,
        **_full(model_type),
        "undo": undone,
        "generate": None if said is None else fast_said is not None and torch.equal(said, fast_said),
    }


def _full(model_type: str) -> dict[str, float]:
    """The largest error of a step that trains every weight; and where that is not small, what rounding makes of it in the stock model."""
    from exactune.models.accelerate import accelerate

    model = tiny_model(model_type).train()
    stock = step(model, batches()["whole"])
    twin = copy.deepcopy(model)
    accelerate(model)
    found = {"full": max(furthest(step(model, batches()["whole"]), stock).values())}
    if found["full"] > CLOSE:
        generator = torch.Generator().manual_seed(0)
        for parameter in twin.parameters():
            parameter.data *= 1 + 1e-9 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        found["rounding"] = max(furthest(step(twin, batches()["whole"]), stock).values())
    return found


def examine_on_gpu(model_type: str) -> dict[str, Any]:
    """One row of the table: for each dtype the errors of the accelerated and of the stock model, against the next wider dtype.

    Raises:
        Unbuildable: there is no tiny model of this type.
    """
    from exactune.models.accelerate import accelerate
    from exactune.models.verify import truth_of

    row: dict[str, Any] = {"type": model_type}
    inputs = [whole_rows(seed) for seed in range(DRAWS)]
    for name, dtype in GPU_DTYPES.items():
        model = with_lora(tiny_model(model_type).to(dtype), torch.promote_types(dtype, torch.float32)).cuda()
        twin = truth_of(model, dtype)
        twin.config._experts_implementation = "eager"
        truths = [step(twin, batch) for batch in inputs]
        try:
            stock = [overall(step(model, batch), truth) for batch, truth in zip(inputs, truths)]
        except RuntimeError as why:
            raise Unbuildable(f"{STOCK_FAILS} in {name}: {str(why).splitlines()[0][:150]}") from why
        report = accelerate(model)
        fast = [overall(step(model, batch), truth) for batch, truth in zip(inputs, truths)]
        row |= _parts(report)
        row[name] = {"fast": _typical(fast), "stock": _typical(stock)}
    return row


def _typical(errors: list[dict[str, float]]) -> dict[str, float]:
    """The geometric mean of each: the ratio of two such is the mean ratio, however seldom a router's near ties make both large."""
    return {name: statistics.geometric_mean(max(error[name], 1e-12) for error in errors) for name in errors[0]}


def _parts(report: Any) -> dict[str, Any]:
    stock_parts: dict[str, list[str]] = {}
    for part in report.parts:
        if not part.fused:
            stock_parts.setdefault(part.kind, []).append(part.reason)
    return {
        "layers": f"{report.fused_layers}/{report.layers}",
        **{kind: "{}/{}".format(*report.count(kind)) for kind in KINDS},
        "head": report.head,
        "stock": {kind: sorted(set(reasons)) for kind, reasons in stock_parts.items()},
        "stock_calls": dict(report.stock_calls),
    }


@dataclass(frozen=True)
class Found:
    """What came of one type: a row, or why there is none."""

    model_type: str
    row: dict[str, Any] | None = None
    left_out: str = ""
    broken: str = ""


def found_of(model_type: str, device: str) -> Found:
    """The row of one type, whatever happens to it."""
    _be_quiet()
    examine: Callable[[str], dict[str, Any]] = examine_on_gpu if device == "cuda" else examine_on_cpu
    try:
        return Found(model_type, examine(model_type))
    except Unbuildable as why:
        return Found(model_type, left_out=str(why))
    except Exception as why:  # one type that breaks must not hide the others
        return Found(model_type, broken=f"{type(why).__name__}: {str(why)[:200]}")


def _be_quiet() -> None:
    import transformers

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)


def census(types: list[str], device: str, jobs: int, out: Path | None) -> None:
    """The table: a row for each type that builds, and why the others do not; in `out` after each type, should time run out."""
    import transformers

    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    failed: dict[str, str] = {}
    about: dict[str, Any] = {"transformers": transformers.__version__, "torch": torch.__version__}
    if device == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(), "draws": DRAWS}

    def save() -> None:
        if out is not None:
            out.write_text(json.dumps(about | {"rows": rows, "left_out": left_out, "failed": failed}, indent=1) + "\n")

    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for result in [pool.apply_async(found_of, (model_type, device)) for model_type in types]:
            found = result.get()
            save()
            if found.row is None:
                (left_out if found.left_out else failed)[found.model_type] = found.left_out or found.broken
                print("left out" if found.left_out else "BROKEN", found.model_type, found.left_out or found.broken, flush=True)
                continue
            rows.append(found.row)
            mark = "ok " if passed(found.row) else "BAD"
            print(mark, "all" if all_fused(found.row) else "   ", json.dumps(found.row), flush=True)
    save()


def main() -> None:
    """Run the census."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all that are registered if none is named")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes that work on types side by side")
    parser.add_argument("--out", type=Path, help="where the data goes; docs/ if every type is examined")
    asked = parser.parse_args()
    name = "models-cuda.json" if asked.device == "cuda" else "models.json"
    out = asked.out or (None if asked.types else DOCS / name)
    census(asked.types or model_types(), asked.device, asked.jobs, out)
    if out == DOCS / name:
        write()


if __name__ == "__main__":
    main()
