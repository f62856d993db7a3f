"""Growing segments: chosen only by who owns the process, before torch is there, and never over the user's choice."""

import subprocess
import sys
from dataclasses import replace

import pytest

from exactune.memory.allocator import GROWING, VARIABLES, let_segments_grow, segments_grow
from exactune.memory.job import Job
from exactune.memory.phases import Step
from exactune.memory.plan import GIB, Plan, choose, fits, fits_beside
from exactune.memory.policy import Policy
from exactune.memory.shape import Shape

LLAMA_8B = Shape(4096, 32, 32, 8, 128, 14336, 128256)


def test_a_process_with_torch_is_left_alone():
    environment = {}
    let_segments_grow(environment)  # these tests have imported torch
    assert environment == {} and not segments_grow(environment)


@pytest.mark.parametrize("given", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}], ids=["nothing", "a choice"])
def test_a_fresh_process_is_told_unless_the_user_has(given):
    code = f"from exactune.memory.allocator import *; e = {given!r}; let_segments_grow(e); print(e, segments_grow(e))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert shown == (f"{given} False" if given else f"{dict.fromkeys(VARIABLES, GROWING)} True")


def test_fixed_segments_leave_more_of_the_budget():
    step = Step(LLAMA_8B, Job(), 4, 2048)
    fixed = replace(step, job=replace(step.job, fragments=True))
    for budget in (20, 28, 45):
        assert choose(fixed, budget * GIB).peak <= choose(step, budget * GIB).peak
    kept = Plan(fixed, (Policy(),) * 32)
    assert fits(kept, round(kept.peak / 0.94)) and not fits(kept, round(kept.peak / 0.96))
    mixed = Plan(fixed, (Policy("mlp"),) * 32)
    assert fits(mixed, round(mixed.peak / 0.86)) and not fits(mixed, round(mixed.peak / 0.88))


@pytest.mark.parametrize("fragments", [True, False])
def test_a_retry_takes_less_whatever_the_segments(fragments):
    plan = Plan(Step(LLAMA_8B, Job(fragments=fragments), 4, 2048), (Policy(),) * 32)
    assert fits_beside(plan).peak < 0.95 * plan.peak
