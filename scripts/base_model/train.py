"""Trains the base model from prepared ids: `PYTHONPATH=scripts python -m base_model.train --data DIR --out DIR --minutes 5`.

One process, one device, no network. The ids lie on the device; each row is a random window of one stream. AdamW, a short warm-up and a
cosine to zero that follows the share of the time (or steps) that has gone. Writes the model folder and `record.json` for the model card.
"""

import argparse
import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from base_model.shape import CONTEXT, SHAPES, new_model

STREAMS = ("plain", "chat")
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass
class Record:
    """What the model card states about a run."""

    shape: str
    parameters: int
    steps: int
    tokens: int
    minutes: float
    device: str
    torch: str
    held_out_perplexity: dict[str, float]


class Windows:
    """Random or consecutive windows of the prepared streams, on the device."""

    def __init__(self, path: Path, device: str, chat_share: float, copy_share: float):
        with np.load(path) as arrays:
            self.streams = {name: torch.from_numpy(arrays[name].astype(np.int16)).to(device) for name in arrays.files}
        self.device, self.chat_share, self.copy_share = device, chat_share, copy_share
        self.vocabulary = 1 + int(max(stream.max() for stream in self.streams.values()))
        self.offsets = torch.arange(CONTEXT + 1, device=device)

    def batch(self, rows: int) -> torch.Tensor:
        """Token ids [rows, CONTEXT + 1]: plain text, conversations, and rows that can only be copied."""
        chats, copies = round(rows * self.chat_share), round(rows * self.copy_share)
        parts = [self.copies(copies)] if copies else []
        for name, count in zip(STREAMS, (rows - chats - copies, chats), strict=True):
            stream = self.streams[name]
            starts = torch.randint(len(stream) - CONTEXT, (count, 1), device=self.device)
            parts.append(stream[starts + self.offsets])
        return torch.cat(parts).long()

    def copies(self, rows: int) -> torch.Tensor:
        """Rows of a few short segments, each coming again and again in random order: [rows, CONTEXT + 1].

        Half of the segments are cut from plain text at random, half are random tokens. What comes next can only be known by looking
        back to where the segment came before, which is how a transformer learns to copy what it has never seen
        (Olsson et al. 2022, "In-context learning and induction heads").
        """
        length = int(torch.randint(3, 41, ()))
        slots = -(-(CONTEXT + 1) // length)
        pool = torch.randint(self.vocabulary, (rows, max(2, slots // 3), length), device=self.device)
        starts = torch.randint(len(self.streams["plain"]) - length, (*pool[: rows // 2].shape[:2], 1), device=self.device)
        pool[: rows // 2] = self.streams["plain"][starts + self.offsets[:length]].long()
        picks = torch.randint(pool.shape[1], (rows, slots, 1), device=self.device).expand(-1, -1, length)
        return pool.gather(1, picks).flatten(1)[:, : CONTEXT + 1]

    def consecutive(self, name: str, rows: int) -> torch.Tensor:
        """Up to `rows` windows that follow each other, for measuring: [n, CONTEXT + 1]."""
        return self.streams[name].unfold(0, CONTEXT + 1, CONTEXT)[:rows].long()


NF4_BLOCK = 64


@torch.no_grad()
def rounded_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """`weight` as NF4 with one absolute maximum a block of 64 would hold it (Dettmers et al. 2023, "QLoRA", appendix E)."""
    blocks = weight.reshape(-1, NF4_BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)
    levels = torch.tensor(NF4, device=weight.device)
    nearest = torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scale).view_as(weight)


class Nf4Passes:
    """Every other step computes with the layers' weights rounded to NF4, its gradients applied to the weights as they are.

    A model this small has little redundancy: trained without, its 4-bit form copies worse, and a QLoRA run pays for it.
    """

    def __init__(self, model, enabled: bool):
        self.weights = [p for name, p in model.named_parameters() if enabled and name.endswith("_proj.weight")]

    def begin(self, step: int) -> None:
        self.whole = [p.detach().clone() for p in self.weights] if step % 2 else []
        for p, whole in zip(self.weights, self.whole, strict=False):
            p.data.copy_(rounded_to_nf4(whole))

    def end(self) -> None:
        for p, whole in zip(self.weights, self.whole, strict=False):
            p.data.copy_(whole)


def loss_of(model, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token, logits in float32."""
    # Only on a GPU: a CPU without bfloat16 instructions multiplies it fifty times slower than float32.
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=ids.is_cuda):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def perplexities(model, windows: Windows, rows: int) -> dict[str, float]:
    """Perplexity per token on the held-out modules' text and conversations."""
    found = {}
    for name in STREAMS:
        batches = windows.consecutive(f"{name}_held_out", rows).split(32)
        losses = torch.stack([loss_of(model, ids) * len(ids) for ids in batches])
        found[name] = round(math.exp(losses.sum().item() / sum(map(len, batches))), 3)
    return found


def optimizer_of(model, learning_rate: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def pretrain(model, windows: Windows, args: argparse.Namespace) -> tuple[int, float]:
    """Trains in place until the time or the steps are up. Returns steps and minutes (compilation not counted)."""
    optimizer = optimizer_of(model, args.learning_rate)
    compiled = torch.compile(model) if args.compile else model
    loss_of(compiled, windows.batch(args.batch)).backward()  # pays for compilation before the clock starts
    model.zero_grad()
    nf4 = Nf4Passes(model, args.nf4)
    step, start = 0, time.perf_counter()
    while (gone := max((time.perf_counter() - start) / (60 * args.minutes), step / args.max_steps)) < 1:
        rate = args.learning_rate * min(1, (step + 1) / args.warmup) * (1 + math.cos(math.pi * gone)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        nf4.begin(step)
        loss = loss_of(compiled, windows.batch(args.batch))
        loss.backward()
        nf4.end()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % args.report_every == 0:
            speed = step * args.batch * CONTEXT / (time.perf_counter() - start)
            held_out = perplexities(model, windows, min(64, args.held_out_rows))
            print(f"step {step} {gone:4.0%} loss {loss.item():.3f} held out {held_out} lr {rate:.1e} {speed:,.0f} tokens/s", flush=True)
    return step, (time.perf_counter() - start) / 60


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that build_corpus wrote")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--shape", choices=SHAPES, default="wide4")
    parser.add_argument("--init", type=Path, help="model folder of an earlier run to go on from, with a fresh schedule")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--batch", type=int, default=128, help=f"rows of {CONTEXT} tokens")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--chat-share", type=float, default=0.6)
    parser.add_argument("--copy-share", type=float, default=0.0)
    parser.add_argument("--nf4", action="store_true", help="every other step with weights rounded to NF4")
    parser.add_argument("--report-every", type=int, default=500, help="steps")
    parser.add_argument("--held-out-rows", type=int, default=1500, help="windows of each kind for the final perplexity")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    windows = Windows(args.data / "ids.npz", device, args.chat_share, args.copy_share)
    model = new_model(args.shape, args.data / "tokenizer").to(device)
    before = {"steps": 0, "tokens": 0, "minutes": 0.0}
    if args.init:
        model.load_state_dict(load_file(args.init / "model.safetensors"), strict=False)  # the tied head is not stored
        before = json.loads((args.init / "record.json").read_text(encoding="utf-8"))
    steps, minutes = pretrain(model, windows, args)
    model.to(torch.bfloat16).save_pretrained(args.out)
    model.float()  # the saved weights, rounded to bfloat16, in a dtype that any device measures quickly
    for path in (args.data / "tokenizer").iterdir():
        shutil.copy(path, args.out)
    record = Record(
        shape=args.shape,
        parameters=model.num_parameters(),
        steps=steps + before["steps"],
        tokens=steps * args.batch * CONTEXT + before["tokens"],
        minutes=round(minutes + before["minutes"], 2),
        device=torch.cuda.get_device_name() if device == "cuda" else "CPU",
        torch=torch.__version__,
        held_out_perplexity=perplexities(model, windows, args.held_out_rows),  # of the bfloat16 weights, as saved
    )
    (args.out / "record.json").write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
    print(json.dumps(asdict(record)))


if __name__ == "__main__":
    main()
