"""Memory plans on a model: what of the model a plan is made from, and how it is put into force."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from exactune.lora.live import is_nf4
from exactune.memory.allocator import segments_grow
from exactune.memory.budget import device_budget, host_budget
from exactune.memory.job import ENDS, LORA_TARGETS, Job
from exactune.memory.mends import chosen
from exactune.memory.offload import HostStore
from exactune.memory.phases import Step
from exactune.memory.plan import Plan
from exactune.memory.policy import Policy, Tiling
from exactune.memory.shape import Shape
from exactune.models.fused_layer import FusedLayer
from exactune.models.hosted import host_embedding, may_be_hosted
from exactune.models.notes import base_model, notes_of


def shape_of(model: Any) -> Shape:
    """The sizes of `model`. A head that is no language model's, such as a reward model's one row, has no weights worth counting.

    Raises:
        ConfigError: an architecture whose layers are not the ones that the plan counts.
    """
    base = base_model(model)
    shape = Shape.of(base.config)
    return shape if base.get_output_embeddings() is not None else replace(shape, tied=True)


def job_of(model: Any, *, optim: str = "adamw_torch", accumulates: bool = False, packed: bool = False, in_backward: bool = False) -> Job:
    """What a step trains on `model` as it stands: formats, adapters, or every weight."""
    base = base_model(model)
    adapters = getattr(model, "peft_config", None)
    quantised = any(is_nf4(module) for module in base.modules())
    width = next(p.element_size() for p in base.parameters() if p.is_floating_point())
    ranks: dict[str, int] = {}
    if adapters:
        of_a = {name: p for name, p in model.named_parameters() if ".lora_A." in name}
        ranks = {name.split(".lora_A.")[0].rpartition(".")[2]: p.shape[0] for name, p in of_a.items()}
    bits: Literal[4, 16, 32] = 4 if quantised else 32 if width == 4 else 16
    return Job(
        bits=bits,
        r=max(ranks.values(), default=1),
        targets=tuple(name for name in LORA_TARGETS if name in ranks),
        full=not adapters,
        whole=_trained_ends(base) if adapters else (),
        optim=optim,
        accumulates=accumulates,
        packed=packed,
        deterministic=any(layer.shared.deterministic for layer in fused_layers(model)),
        graphs=_passes_of(model) is not None,
        dropout=any(getattr(rate, "p", 0.0) > 0 for module in base.modules() for rate in _dropouts(module)),
        in_backward=in_backward,
        fragments=base.device.type == "cuda" and not segments_grow(),
        own_embedding=may_be_hosted(model),
        gpu=base.device.type == "cuda",
    )


def _trained_ends(base: Any) -> tuple[str, ...]:
    """Which of embedding and head are trained whole; a copy that both share counts once."""
    found: dict[int, str] = {}
    for name, module in zip(ENDS, (base.get_input_embeddings(), base.get_output_embeddings())):
        for path, p in () if module is None else module.named_parameters():
            if p.requires_grad and "lora_" not in path and p.dim() == 2:
                found.setdefault(id(p), name)
    return tuple(found.values())


def _dropouts(module: Any) -> Iterable[Any]:
    """The dropout before each adapter of a PEFT layer."""
    held = getattr(module, "lora_dropout", None)
    return held.values() if isinstance(held, torch.nn.ModuleDict) else ()


def make_plan(model: Any, rows: int, tokens: int, *, budget: Any = "auto", host: Any = "auto", **job: Any) -> Plan:
    """The fastest plan for steps of `rows` x `tokens` tokens on `model` within `budget` and `host` memory (such as "24GiB").

    Raises:
        DeviceError: no plan fits; the message lists what would.
        ConfigError: an architecture that is not planned for, or a budget that cannot be read.
    """
    return chosen(step_of(model, rows, tokens, **job), device_budget(budget), host_budget(host))


def step_of(model: Any, rows: int, tokens: int, *, hosted: bool = False, **job: Any) -> Step:
    """A training step on `model` as it stands; `job` are options of `job_of`.

    Raises:
        ConfigError: an architecture that is not planned for.
    """
    return Step(shape_of(model), job_of(model, **job), rows, tokens, hosted=hosted)


def fused_layers(model: Any) -> list[FusedLayer]:
    """The fused decoder layers of an accelerated model, in order."""
    base = base_model(model)
    modules = getattr(base.get_decoder(), "layers", ()) if hasattr(base, "get_decoder") else ()
    forwards = (vars(module).get("forward") for module in modules)
    return [forward for forward in forwards if isinstance(forward, FusedLayer)]


def apply_plan(model: Any, plan: Plan) -> None:
    """Put `plan` into force on an accelerated model; layers that are stock go on as transformers' checkpointing tells them.

    It stays whatever comes: a plan that was to be made for each larger batch (`exactune.models.auto_plan`) is not any more.
    """
    notes = notes_of(model)
    if notes.memory is not None:
        notes.memory.leave()
        notes.memory = None
    apply_choices(model, plan)


def apply_choices(model: Any, plan: Plan) -> None:
    """The policies and tiles of `plan` on the layers of an accelerated model."""
    modules = list(base_model(model).get_decoder().layers)
    step = plan.step
    apply_policies(model, dict(zip(map(id, modules), plan.layers)), step.tiling, ahead=step.ahead, hosted=step.hosted)
    passes = _passes_of(model)
    if passes is not None:
        passes.only = plan.only


def apply_policies(model: Any, policies: dict[int, Policy], tiling: Tiling, *, ahead: bool, hosted: bool = False) -> None:
    """`policies` by the id of the layer's module; `hosted` embeddings are in host memory."""
    layers = fused_layers(model)
    if not layers:
        return
    shared = layers[0].shared
    if isinstance(shared.store, HostStore):
        shared.store.reset()
    travels = any(policy.offload != "nothing" for policy in policies.values())
    shared.tiling, shared.store = tiling, HostStore(device_of(layers), ahead=ahead) if travels else None
    for layer in layers:
        layer.policy = policies.get(id(layer.module))
    host_embedding(model, hosted)
    forget_recordings(model)  # they keep the activations of the old policies


def forget_recordings(model: Any) -> None:
    """Drop the recorded passes (`exactune.models.replay`), as if none had been seen."""
    passes = _passes_of(model)
    if passes is not None:
        passes.clear()


def _passes_of(model: Any) -> Any:
    """The recorded passes of a model (`exactune.models.replay.Passes`), or None where nothing is recorded."""
    return getattr(base_model(model).forward, "passes", None)


def device_of(layers: Sequence[FusedLayer]) -> torch.device:
    """Where the layers' activations are."""
    return next(layers[0].module.parameters()).device
