"""`exactune plan`: what a training step takes, predicted from the model's config alone, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exactune.errors import ConfigError

if TYPE_CHECKING:
    from exactune.memory.phases import Step
    from exactune.memory.plan import Plan
    from exactune.memory.shape import Shape


def plan(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG.yaml", help="The settings of a run; flags win over the file.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder or hub name; its config.json is all that is read.")] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens in a row.", min=1)] = None,
    batch: Annotated[int | None, typer.Option(help="Rows in one forward pass.", min=1)] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Memory of the GPU, such as 24GiB; left out, the config's memory_budget or this machine's.")
    ] = None,
    host: Annotated[str, typer.Option(help="Host memory to use, such as 64GiB, or auto.")] = "auto",
    method: Annotated[str | None, typer.Option(help="lora, qlora or full.")] = None,
    r: Annotated[int | None, typer.Option(help="Rank of the adapter.", min=1)] = None,
    optim: Annotated[str | None, typer.Option(help="Optimizer: adamw_torch, adamw_8bit, paged_adamw_8bit, ...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Predict the memory and the relative speed of a run: no weights and no GPU needed.

    Shows what each part takes, the fastest mix of policies that fits, the longest row and the largest batch.
    """
    from exactune.memory.budget import device_budget, host_budget
    from exactune.memory.mends import chosen

    given = {"model": model, "seq": seq, "batch": batch, "method": method, "r": r, "optim": optim}
    run = _settings(config)
    step = _step(run, {name: value for name, value in given.items() if value is not None})
    budget, beside = device_budget(gpu or run.get("memory_budget")), host_budget(host)
    found = chosen(step, budget, beside)
    if as_json:
        typer.echo(json.dumps(found.as_dict() | {"budget_bytes": budget, "host_budget_bytes": beside}, indent=2))
    else:
        _show(found, budget, beside)


def _settings(config: Path | None) -> dict[str, Any]:
    """Every setting of the run that `config` describes; none without one."""
    if config is None:
        return {}
    from exactune.train.config import TrainConfig

    return TrainConfig.from_yaml(config).model_dump()


def _step(run: dict[str, Any], given: dict[str, Any]) -> Step:
    from exactune.memory.job import LORA_TARGETS, Job
    from exactune.memory.phases import Step

    name = given.get("model") or run.get("model_name")
    if name is None:
        raise ConfigError("There is no model to plan for.", "Give a run's YAML file, or --model with a folder or hub name.")
    method = given.get("method") or run.get("method") or "lora"
    if method not in ("lora", "qlora", "full"):
        raise ConfigError(f"method {method!r} is none of lora, qlora and full.")
    shape, targets = _shape(name), run.get("target_modules")
    job = Job(
        bits=4 if method == "qlora" else 16,
        r=given.get("r") or run.get("r") or 16,
        targets=tuple(targets) if isinstance(targets, list) else LORA_TARGETS,
        full=method == "full",
        optim=given.get("optim") or run.get("optim") or "adamw_torch",
        accumulates=(run.get("gradient_accumulation_steps") or 1) > 1,
        packed=bool(run.get("packing")),
        deterministic=bool(run.get("deterministic")),
        in_backward=bool(run.get("optimizer_in_backward")),
        graphs=run.get("cuda_graphs", True),
        whole=() if method == "full" else _trained_ends(run, shape),
        own_embedding=True,
        dropout=bool(run.get("lora_dropout")),
    )
    rows = given.get("batch") or run.get("per_device_train_batch_size") or 2
    return Step(shape, job, rows, given.get("seq") or run.get("max_seq_length") or 2048)


def _trained_ends(run: dict[str, Any], shape: Shape) -> tuple[str, ...]:
    """Which of embedding and head the run trains whole, beside its adapter; a matrix that is both, once."""
    from exactune.memory.job import ENDS

    both = run.get("embedding_learning_rate") is not None
    named = tuple(name for name in ENDS if both or name in (run.get("modules_to_save") or ()))
    return named[:1] if shape.tied else named


def _shape(name: str) -> Shape:
    from exactune.memory.shape import Shape
    from exactune.models.plainly import said_plainly

    with said_plainly(name):
        from transformers import AutoConfig

        return Shape.of(AutoConfig.from_pretrained(str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name))


def _show(plan: Plan, budget: int, host: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from exactune.memory.plan import CONTEXT, GIB, longest, most_rows

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for column, side in (("on the GPU", "left"), ("GiB", "right")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for name, size in plan.fixed.items():
        if size:
            table.add_row(name, f"{size / GIB:.2f}")
    widest = max(plan.phases, key=lambda phase: plan.phases[phase])
    working = plan.phases[widest] - plan.activations
    table.add_row("activations kept", f"{plan.activations / GIB:.2f}")
    table.add_row(f"workspace and gradients ({widest})", f"{max(working, 0) / GIB:.2f}")
    table.add_row("[bold]predicted peak[/]", f"[bold]{plan.peak / GIB:.2f}[/]")
    table.add_row("of a budget of", f"{budget / GIB:.2f}")
    table.add_row("CUDA itself, beside the budget", f"{CONTEXT / GIB:.2f}")
    console.print(table)
    console.print()
    console.print(_policies(plan))
    step = plan.step
    console.print(f"\nPlan: {plan.summary()}", soft_wrap=True)
    console.print(f"Host memory: {plan.host / GIB:.1f} of {host / GIB:.0f} GiB")
    console.print(f"Longest row that fits: {longest(step, budget, host):,} tokens ({step.rows} in a batch)", soft_wrap=True)
    console.print(f"Largest batch that fits: {most_rows(step, budget, host):,} rows of {step.tokens:,} tokens", soft_wrap=True)


def _policies(plan: Plan) -> Any:
    """Every policy on all layers: activations, peak and speed."""
    from rich.table import Table

    from exactune.memory.plan import GIB, LADDER, Plan
    from exactune.memory.policy import policies

    table = Table(box=None, pad_edge=False)
    for column in ("all layers", "activations GiB", "host GiB", "peak GiB", "speed", "layers in the plan"):
        table.add_column(column, justify="left" if column == "all layers" else "right")
    for name in LADDER:
        pure = Plan(plan.step, (policies()[name],) * plan.step.shape.layers)
        sizes = [f"{size / GIB:.2f}" for size in (pure.activations, pure.host, pure.peak)]
        table.add_row(name, *sizes, f"{pure.relative_speed:.0%}", str(plan.counts.get(name, "")))
    return table
