"""Memory on this GPU: speed against memory, predictions against measurements, full fine-tuning, the longest contexts under a cap.

    python bench/memory.py --model DIR [--small DIR] [--what curve table ...] [--minutes 8] [--out FILE] [--plot PNG]

- curve: the fastest plan for each of a row of budgets, 16-bit and NF4, 4 x 2,048 tokens.
- table: named policies, long rows and packed ones, on the model and the smaller one; `layer+all` beside `layer` is what offloading costs.
- small: the smaller model in NF4, 2 x 2,048 tokens, recorded as CUDA graphs: in 1.75 GiB, in 2.5, with everything kept. A recorded pass
  holds its memory between the steps, so what is reserved counts as its peak.
- full: every weight trained at 1 x 4,096 with 8-bit AdamW stepping in the backward, beside stock.
- contexts: one row of 81,920 tokens under 12 GiB (a minute); `longest` adds 262,144 under 24 GiB (five minutes, 97 GiB of host memory).

The allocator is capped at each budget (`set_per_process_memory_fraction`): a plan that needs more fails. Its segments grow, as
`exactune train` has it (`exactune.memory.allocator`), unless PYTORCH_ALLOC_CONF says otherwise. Settings of one model share a
process (`memory_worker.py`), which is started anew after a setting that ended it or took too long. What `--minutes` leaves no
time for is not measured and said to be so. Peers' points are drawn from `PEERS`, measured under the same conditions.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

BUDGETS = {"16": (17.7, 45, 24, 20, 30, 38, 16.7), "4": (8, 30, 14, 10, 20, 7)}  # the ends first
# (bits, kind, GiB, tokens/s) at 4 x 2,048, r = 16, one H200; gradient checkpointing and without.
PEERS = (
    ("16", "HF+PEFT", 31.3, 7928), ("16", "HF+PEFT", 82.4, 11031), ("16", "HF+Liger", 19.7, 9452), ("16", "HF+Liger", 58.6, 13207),
    ("16", "Unsloth", 17.7, 11313), ("16", "Unsloth", 45.8, 16027), ("4", "HF+PEFT", 21.7, 8391), ("4", "HF+Liger", 9.35, 10265),
    ("4", "Unsloth", 8.05, 11131), ("4", "Unsloth", 36.1, 15854),
)  # fmt: skip
WORKER = Path(__file__).with_name("memory_worker.py")
LOADING = 120.0  # seconds that a worker may take to load its model
SAME_MODEL = ("model", "bits", "r", "full", "stock", "graphs")  # settings that agree in these share a process


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder (make_random_llama.py writes one)")
    parser.add_argument("--small", help="folder of a smaller model, for the table")
    kinds = ["curve", "table", "small", "full", "contexts"]
    parser.add_argument("--what", nargs="+", choices=[*kinds, "longest"], default=kinds)
    parser.add_argument("--bits", nargs="+", default=["16", "4"], choices=["16", "4"])
    parser.add_argument("--host", default="100GiB", help="host memory to use")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a setting, after two to warm up")
    parser.add_argument("--minutes", type=float, default=60, help="begin no setting after so many")
    parser.add_argument("--timeout", type=float, default=90, help="seconds that a setting may take, the long contexts apart")
    parser.add_argument("--out", type=Path, help="append the results here, one JSON line each")
    parser.add_argument("--plot", type=Path, help="draw the curve here")
    return parser.parse_args()


def settings_of(args: argparse.Namespace) -> list[dict]:
    """Every setting that was asked for, those of one model together, the most telling first."""
    base = {
        "model": args.model, "host": args.host, "timeout": args.timeout, "steps": args.steps, "warm_up": 2, "r": 16, "rows": 4,
        "tokens": 2048, "full": False, "stock": False, "graphs": False, "packed": False, "policy": None, "gib": None,
    }  # fmt: skip
    found = []
    for bits in args.bits:
        sized = base | {"bits": bits}
        if "curve" in args.what:
            found += [sized | {"gib": gib, "what": "curve"} for gib in BUDGETS[bits]]
        if "table" in args.what:
            found += _table(sized)
    if "small" in args.what and args.small:
        small = base | {"model": args.small, "bits": "4", "rows": 2, "what": "small", "warm_up": 4}  # recorded by then
        found += [small | {"graphs": True, "gib": gib} for gib in (1.75, 2.5)] + [small | {"graphs": True, "policy": "keep"}]
    if "full" in args.what:
        full = base | {"bits": "16", "full": True, "rows": 1, "tokens": 4096, "what": "full"}
        found += [full | {"gib": 40}, full | {"stock": True}]
    long = base | {"bits": "4", "r": 32, "rows": 1, "warm_up": 0, "steps": 1, "what": "contexts"}
    if "contexts" in args.what:
        found.append(long | {"gib": 12, "tokens": 81_920, "warm_up": 1, "timeout": 240})
    if "table" in args.what and args.small:
        for bits in args.bits:
            found += _table(base | {"model": args.small, "bits": bits})
    if "longest" in args.what:
        found.append(long | {"gib": 24, "tokens": 262_144, "timeout": 540})
    return found


def _table(sized: dict) -> list[dict]:
    sized = sized | {"what": "table", "warm_up": 1, "steps": 2}
    long = sized | {"policy": "layer+all", "rows": 1, "tokens": 16384}
    packed = sized | {"policy": "mlp", "rows": 1, "tokens": 8192, "packed": True}
    return [*(sized | {"policy": policy} for policy in ("layer", "layer+all", "mlp+all")), packed, long]


def groups_of(settings: list[dict]) -> list[list[dict]]:
    """Settings by the process that measures them, in the order of their first."""
    found: dict[tuple, list[dict]] = {}
    for setting in settings:
        found.setdefault(tuple(setting[name] for name in SAME_MODEL), []).append(setting)
    return list(found.values())


def measured(settings: list[dict], until: float) -> Iterator[dict]:
    """The result of each setting, in order; a worker that ends or takes too long costs the setting it was at."""
    left = list(settings)
    while left and time.time() < until:
        worker = subprocess.Popen([sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert worker.stdin and worker.stdout
        worker.stdin.write(json.dumps(left))
        worker.stdin.close()
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_read, args=(worker.stdout, lines), daemon=True).start()
        try:
            patience = LOADING
            while left and time.time() < until:
                line = lines.get(timeout=patience + left[0]["timeout"])
                patience = 0.0
                left.pop(0)
                yield json.loads(line or '{"error": "its process ended: see above"}')
                if not line:
                    break
        except queue.Empty:
            yield {"error": f"stopped after {left.pop(0)['timeout']:.0f} s"}
        finally:
            worker.kill()
            worker.wait()
    yield from ({"error": "not measured: no time left"} for _ in left)


def _read(stream, lines: queue.Queue) -> None:
    """Results as they are printed, and an empty line for the end."""
    for line in stream:
        if line.startswith("{"):
            lines.put(line)
    lines.put("")


def title_of(setting: dict) -> str:
    cap = f" under {setting['gib']} GiB" if setting["gib"] else ""
    kind = (" full" if setting["full"] else f" r={setting['r']}") + " stock" * setting["stock"] + " graphs" * setting["graphs"]
    shape = f"{setting['rows']}x{setting['tokens']}{' packed' * setting['packed']}"
    policy = f" {setting['policy']}" if setting["policy"] else ""
    return f"{Path(setting['model']).name} {setting['bits']}-bit {shape}{kind}{policy}{cap}"


def show(result: dict) -> None:
    if "error" in result:
        print(f"{result['title']:52} {result['error']}", flush=True)
        return
    predicted, off = result.get("predicted_gib", float("nan")), result.get("off", float("nan"))
    numbers = f"{result['tokens_s']:9} {result['ms']:9.1f} {predicted:10.2f} {result['peak_gib']:7.2f} {off:7.1%}"
    print(f"{result['title']:52} {numbers} {result['reserved_gib']:9.2f} {result['gap']:6.1%}   {result.get('plan', '')}", flush=True)
    if result.get("recorded"):
        print(f"{'':52} recorded: {result['recorded']}", flush=True)


def draw(results: list[dict], path: Path) -> None:
    """tokens/s against the measured peak, with the peers' points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, bits in zip(axes, ("16", "4")):
        mine = [r for r in results if r["setting"]["what"] == "curve" and r["setting"]["bits"] == bits and "tokens_s" in r]
        if mine:
            axis.plot(*zip(*sorted((r["peak_gib"], r["tokens_s"]) for r in mine)), "o-", label="Exactune")
        for kind, mark in (("HF+PEFT", "s"), ("HF+Liger", "^"), ("Unsloth", "D")):
            points = [(gib, speed) for b, k, gib, speed in PEERS if (b, k) == (bits, kind)]
            axis.plot(*zip(*points), mark, label=kind)
        axis.set(title="NF4" if bits == "4" else "16 bits", xlabel="peak allocated, GiB", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("tokens/s")
    axes[0].legend()
    figure.suptitle("Llama-3.1-8B shape, LoRA r = 16, 4 x 2,048 tokens")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    args = arguments()
    from exactune.memory.allocator import let_segments_grow

    let_segments_grow()  # for the workers, which inherit it
    from report import provenance

    about, results, until = provenance(), [], time.time() + 60 * args.minutes
    print(f"{'':52} {'tokens/s':>9} {'ms':>9} {'predicted':>10} {'peak':>7} {'off':>7} {'reserved':>9} {'gap':>6}")
    for settings in groups_of(settings_of(args)):
        for setting, found in zip(settings, measured(settings, until)):
            results.append(found | {"setting": setting, "title": title_of(setting)})
            show(results[-1])
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps({**results[-1], **about}) + "\n")
    if args.plot:
        draw(results, args.plot)


if __name__ == "__main__":
    main()
