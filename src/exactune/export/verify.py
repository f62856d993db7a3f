"""Is the artefact the model? Logits of the reloaded checkpoint against those of the adapter model in memory.

The bound comes from the dtypes: a weight (or an activation) that is rounded once moves by a random part of half a unit in the
last place, so every module's output is shaken by that much, once, and what this does to this model's logits is measured. A merge
whose error is about that size is a merge that rounded once. One that lost an adapter is off by the adapter's effect.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# The error and the measured noise are two draws of one random process, each a norm over thousands of logits. Two such draws agree
# within tens of per cent; the factor leaves room for roundings the model of noise does not have (accumulation inside a product).
SLACK = 4.0
SEED = 3407
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Agreement:
    """Two sets of logits compared over all prompts; `kl` in nats a token, of the found from the wanted distribution."""

    max_abs_error: float
    relative_error: float
    kl: float
    top1: float  # share of positions where the likeliest token is the same


@torch.no_grad()
def logits_of(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Float32 logits [T, V] on the CPU for each prompt: no cache, no dropout, nothing seen of the others."""
    # a model whose weights are streamed from the disk has none on any device
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    modes = [module.training for module in model.modules()]
    model.eval()
    try:
        return [logits for batch in _batches(prompts) for logits in _batch_logits(model, batch, device)]
    finally:
        for module, mode in zip(model.modules(), modes):
            module.training = mode


def _batches(prompts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Prompts that run together: the fewer passes, the less often a streamed model is read."""
    batch: list[Sequence[int]] = []
    for ids in prompts:
        if batch and max(map(len, (*batch, ids))) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(ids)
    if batch:
        yield batch


def _batch_logits(model: nn.Module, batch: Sequence[Sequence[int]], device: torch.device) -> list[torch.Tensor]:
    """Padded on the right, where causal attention never looks, so no mask is needed: one would change the path that attention takes."""
    width = max(map(len, batch))
    ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in batch], device=device)
    logits = model(input_ids=ids, use_cache=False).logits
    return [row[: len(ids)].float().cpu() for row, ids in zip(logits, batch, strict=True)]


def compare(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> Agreement:
    """How far `found` is from `wanted`, both [T, V] for each prompt."""
    if not all(bool(torch.isfinite(t).all()) for t in (*found, *wanted)):
        return Agreement(math.inf, math.inf, math.inf, 0.0)
    difference = size = kl = 0.0
    largest = same = tokens = 0.0
    for a, b in zip(found, wanted, strict=True):
        a, b = a.double(), b.double()
        difference += float((a - b).square().sum())
        size += float(b.square().sum())
        largest = max(largest, float((a - b).abs().max()))
        log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
        kl += float((log_b.exp() * (log_b - log_a)).sum())
        same += float((a.argmax(-1) == b.argmax(-1)).sum())
        tokens += len(a)
    relative = math.sqrt(difference / size) if size > 0 else math.inf
    return Agreement(largest, relative, kl / tokens, same / tokens)


def unit_roundoff(*dtypes: torch.dtype) -> float:
    """Half a unit in the last place, relative, of the coarsest of `dtypes`."""
    return max(torch.finfo(dtype).eps for dtype in dtypes) / 2


@contextlib.contextmanager
def shaken(model: nn.Module, unit: float, seed: int = SEED) -> Iterator[None]:
    """Within the block, the output of every module that holds weights is off by a random part of one rounding."""
    generator = torch.Generator().manual_seed(seed)

    def shake(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return output
        # rounding is uniform in [-unit, unit] of the value: standard deviation unit / sqrt(3)
        size = output.float().square().mean().sqrt() * unit / math.sqrt(3)
        noise = torch.randn(output.shape, generator=generator).to(output.device)
        return (output.float() + noise * size).to(output.dtype)

    hooks = [m.register_forward_hook(shake) for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    try:
        with stock_forwards(model):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def stock_forwards(model: nn.Module) -> Iterator[None]:
    """Within the block every module runs its class's forward: a fast one computes several modules at once, past their hooks."""
    stashed = [(m, m.__dict__.pop("forward")) for m in model.modules() if _is_ours(m.__dict__.get("forward"))]
    try:
        yield
    finally:
        for module, forward in stashed:
            module.__dict__["forward"] = forward


def _is_ours(forward: Any) -> bool:
    return type(forward).__module__.startswith("exactune.")


def rounding_noise(model: nn.Module, prompts: Sequence[Sequence[int]], logits: Sequence[torch.Tensor], unit: float) -> float:
    """Relative change of the logits when every weight's rounding is drawn again; the largest of three draws where experts are chosen.

    A token that a rounding sends to another expert moves the logits by far more than the rounding: such events are few and rare.
    """
    config = getattr(model, "config", None)
    routed = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    noise = 0.0
    for draw in range(3 if routed else 1):
        with shaken(model, unit, SEED + draw):
            noise = max(noise, compare(logits_of(model, prompts), logits).relative_error)
    return noise


def prompts_for(tokenizer: Any, vocabulary: int, touched: Sequence[int] = (), texts: Sequence[str] = ()) -> list[list[int]]:
    """What both models are asked: the guard's conversations (or `texts`), and random ids so that no row of the vocabulary is out of reach.

    `touched`: ids whose rows were trained on their own and must be among them.
    """
    from exactune.export.template_guard import CONVERSATIONS, TEXTS, encode, has_template, render

    prompts: list[list[int]] = []
    if tokenizer is not None:
        if texts:
            found = [encode(tokenizer, text, add_special_tokens=True) for text in texts]
        elif has_template(tokenizer):
            found = [
                encode(tokenizer, render(tokenizer, *CONVERSATIONS[name]), add_special_tokens=False)
                for name in ("system", "several turns", "unicode")
            ]
        else:
            found = [encode(tokenizer, " ".join(TEXTS), add_special_tokens=True)]
        prompts += [[i for i in ids if i < vocabulary][:256] for ids in found]
    generator = torch.Generator().manual_seed(SEED)
    prompts.append([*touched[:32], *torch.randint(vocabulary, (64,), generator=generator).tolist()])
    return [ids for ids in prompts if ids]
