"""Plans from shapes and a budget alone: they fit, they are the same every time, and more memory never makes them slower."""

import itertools
from dataclasses import replace

import pytest

from exactune.errors import ConfigError, DeviceError
from exactune.memory.budget import device_budget, parse_bytes
from exactune.memory.job import Job
from exactune.memory.mends import nearest, too_large
from exactune.memory.phases import Step
from exactune.memory.plan import GIB, LADDER, MARGIN, Plan, choose, fits, fits_beside, leanest, longest, most_rows, spread
from exactune.memory.policy import Tiling, policies
from exactune.memory.recordings import ROUNDED, WORKSPACE
from exactune.memory.shape import Shape

LLAMA_8B = Shape(4096, 32, 32, 8, 128, 14336, 128256)
LLAMA_1B = Shape(2048, 16, 32, 8, 64, 8192, 128256, tied=True)


def all_of(name, step):
    return Plan(step, (policies()[name],) * step.shape.layers)


@pytest.mark.parametrize(("bits", "measured"), [(16, 39.55), (4, 30.20)])
def test_peak_with_everything_kept_is_what_an_h200_measured(bits, measured):
    """`bench/results`: the 8B shape at 4 x 2,048, r = 16, nothing recomputed."""
    assert all_of("keep", Step(LLAMA_8B, Job(bits=bits), 4, 2048)).peak / GIB == pytest.approx(measured, rel=0.03)


def test_more_memory_is_never_slower_and_every_plan_fits():
    step, seconds = Step(LLAMA_8B, Job(bits=4), 4, 2048), float("inf")
    for gib in (7.8, 8, 9, 12, 16, 20, 24, 28, 32, 40):
        plan = choose(step, int(gib * GIB), 64 * GIB)
        assert plan is not None and fits(plan, int(gib * GIB), 64 * GIB)
        assert plan.seconds <= seconds
        seconds = plan.seconds
    assert plan.counts == {"keep": 32}


def test_the_same_question_has_the_same_answer():
    step = Step(LLAMA_8B, Job(bits=16), 4, 2048)
    assert choose(step, 24 * GIB, 64 * GIB) == choose(Step(LLAMA_8B, Job(bits=16), 4, 2048), 24 * GIB, 64 * GIB)


def test_host_memory_bounds_what_is_sent_away():
    step = Step(LLAMA_8B, Job(bits=4), 4, 2048)
    rich, poor = choose(step, 10 * GIB, 64 * GIB), choose(step, 10 * GIB, 1 * GIB)
    assert rich is not None and poor is not None
    assert poor.host <= GIB < rich.host and poor.seconds > rich.seconds


@pytest.mark.parametrize(("tokens", "gib"), [(81_920, 12), (262_144, 24)])
def test_long_contexts_fit_in_tiles(tokens, gib):
    step = Step(LLAMA_8B, Job(bits=4, r=32), 1, tokens)
    plan = choose(step, gib * GIB, 128 * GIB)
    assert plan is not None and plan.step.tiled and plan.peak < gib * GIB
    assert longest(Step(LLAMA_8B, Job(bits=4, r=32), 1, 256), gib * GIB, 128 * GIB) >= tokens


def test_small_model_is_recorded_in_the_peers_memory():
    jobs = [Job(bits=4, optim="adamw_torch_fused", graphs=graphs) for graphs in (False, True)]
    eager, recorded = (choose(Step(LLAMA_1B, job, 2, 2048), int(1.75 * GIB), 8 * GIB) for job in jobs)
    assert eager is not None and recorded is not None and not recorded.host
    assert recorded.fixed["recorded passes"] and recorded.only == (2, 2048)
    assert recorded.seconds < 0.8 * eager.seconds


def test_full_fine_tuning_with_the_step_in_the_backward():
    job = Job(bits=16, full=True, optim="adamw_8bit", in_backward=True)
    plan = choose(Step(LLAMA_8B, job, 1, 4096), 40 * GIB, 64 * GIB)
    assert plan is not None
    ordinary = all_of("layer", Step(LLAMA_8B, Job(bits=16, full=True), 1, 4096))
    assert ordinary.peak > 59 * GIB


def test_the_optimizer_in_the_backward_spares_the_gradients():
    def peak(in_backward):
        return all_of("layer", Step(LLAMA_8B, Job(full=True, optim="adamw_8bit", in_backward=in_backward), 1, 4096)).peak

    assert peak(False) - peak(True) > 9 * GIB


def test_eight_bit_state_of_an_embedding_stays_in_32_bits():
    job, whole = Job(full=True, optim="adamw_8bit"), Job(full=True, optim="paged_adamw_8bit")
    embedding = 8 * LLAMA_8B.vocabulary * LLAMA_8B.hidden
    rest = (2 + 8 / 256) * (LLAMA_8B.parameters - LLAMA_8B.vocabulary * LLAMA_8B.hidden)
    assert job.optimizer(LLAMA_8B) == whole.optimizer_host(LLAMA_8B) == pytest.approx(rest + embedding, abs=1)
    assert job.optimizer_host(LLAMA_8B) == whole.optimizer(LLAMA_8B) == 0


def test_recorded_passes_hold_a_second_set_and_hide_the_launches():
    eager, recorded = (Step(LLAMA_1B, Job(bits=4, graphs=graphs), 1, 512) for graphs in (False, True))
    kept, again = all_of("keep", eager), all_of("keep", recorded)
    second_set = round(max(kept.phases.values())) + WORKSPACE + ROUNDED + recorded.job.gradients(LLAMA_1B)
    assert again.peak == kept.peak + second_set and again.seconds < kept.seconds
    alone = all_of("keep", replace(recorded, alone=True))
    assert kept.peak < alone.peak < again.peak and alone.seconds == again.seconds
    assert all_of("layer+all", recorded).seconds == all_of("layer+all", eager).seconds, "copies to the host are not recorded"
    large = [all_of("keep", Step(LLAMA_8B, Job(graphs=graphs), 4, 2048)) for graphs in (False, True)]
    assert large[0].peak == large[1].peak and large[0].seconds == large[1].seconds


def test_a_recording_takes_what_an_h200_reserved():
    """The 1B shape at 2 x 2,048, r = 16, nothing recomputed: 5.04 GiB."""
    step = Step(LLAMA_1B, Job(bits=4, optim="adamw_torch_fused", graphs=True), 2, 2048, alone=True)
    assert all_of("keep", step).peak / GIB == pytest.approx(5.04, rel=0.02)


def test_recordings_have_the_memory_beside_eager_passes_or_alone_or_not_at_all():
    step = Step(LLAMA_1B, Job(bits=4, graphs=True), 1, 512)
    least = leanest(step, host=False).peak / (1 - MARGIN)
    roomy, tight, none = (choose(step, int(budget), 0) for budget in (4 * GIB, least + 0.15 * GIB, least + 1e6))
    assert roomy.fixed["recorded passes"] and roomy.only is None
    assert tight.fixed["recorded passes"] and tight.only == (1, 512)
    assert not none.step.job.graphs and not none.fixed["recorded passes"] and none.only is None


def test_rows_of_many_lengths_do_not_compete_for_one_recording():
    packed, whole = (choose(Step(LLAMA_1B, Job(bits=4, graphs=True, packed=packed), 2, 2048), 3 * GIB, 0) for packed in (True, False))
    assert packed.only and not whole.only and packed.seconds < whole.seconds


def test_torchs_optimizer_over_lists_forms_a_second_copy_of_what_is_trained():
    small = [Plan(Step(LLAMA_8B, Job(bits=4, optim=optim, r=256), 1, 64), (policies()["keep"],) * 32) for optim in ("adamw_torch", "sgd")]
    assert small[0].phases["update"] == 2 * small[1].phases["update"] == max(small[0].phases.values())


def test_embeddings_wait_on_the_host_where_that_is_cheaper_than_a_leaner_policy():
    def step(**job):
        return Step(LLAMA_8B, Job(bits=4, **job), 4, 2048)

    table = 2 * LLAMA_8B.vocabulary * LLAMA_8B.hidden
    own, host = choose(step(own_embedding=True), 8 * GIB, 64 * GIB), 64 * GIB
    assert own.step.hosted and own.seconds < choose(step(), 8 * GIB, host).seconds
    here = Plan(replace(own.step, hosted=False), own.layers)
    assert here.peak - own.peak == table and own.host - here.host == GIB and 0.001 < own.seconds - here.seconds < 0.01
    assert not choose(step(own_embedding=True), 40 * GIB, host).step.hosted, "there is room for it"
    assert leanest(step()).peak - leanest(step(own_embedding=True)).peak == table
    assert not leanest(step(own_embedding=True), host=False).step.hosted
    assert not leanest(Step(LLAMA_1B, Job(bits=4, own_embedding=True), 2, 2048)).step.hosted, "the head reads all of it"
    assert Plan.from_dict(here.step, own.as_dict()) == own


def test_the_constant_that_says_what_is_recorded():
    from exactune.memory import phases
    from exactune.models import replay

    assert phases.LAUNCH_BOUND == replay.LAUNCH_BOUND


def test_deterministic_attention_needs_no_room_beside_its_results():
    tiles = Tiling(tokens=2048)  # else the MLP's widest moment is wider
    either = [all_of("layer", Step(LLAMA_8B, Job(deterministic=choice), 1, 32768, tiles)) for choice in (False, True)]
    assert either[1].peak < either[0].peak


def test_longest_and_largest_are_the_last_that_fit():
    step = Step(LLAMA_8B, Job(bits=4), 2, 2048)
    tokens, rows = longest(step, 12 * GIB, 32 * GIB), most_rows(step, 12 * GIB, 32 * GIB)
    assert choose(Step(LLAMA_8B, Job(bits=4), 2, tokens), 12 * GIB, 32 * GIB) is not None
    assert choose(Step(LLAMA_8B, Job(bits=4), 2, tokens + 256), 12 * GIB, 32 * GIB) is None
    assert choose(Step(LLAMA_8B, Job(bits=4), rows, 2048), 12 * GIB, 32 * GIB) is not None
    assert choose(Step(LLAMA_8B, Job(bits=4), rows + 1, 2048), 12 * GIB, 32 * GIB) is None


def test_mends_fit_and_are_told_with_their_peaks():
    step = Step(LLAMA_8B, Job(bits=16), 64, 8192)
    mends = nearest(step, 24 * GIB, 32 * GIB)
    assert len(mends) == 3
    assert all(fits(mend.plan, 24 * GIB, 32 * GIB) for mend in mends)
    assert [mend.distance for mend in mends] == sorted(mend.distance for mend in mends)
    error = too_large(step, 24 * GIB, 32 * GIB)
    assert isinstance(error, DeviceError) and "64 x 8,192 tokens" in error.problem
    assert error.mend.count("peak") == 3


def test_a_leaner_plan_keeps_step_and_tiles():
    plan = all_of("keep", Step(LLAMA_8B, Job(bits=16), 4, 2048))
    while (leaner := fits_beside(plan)) is not None:
        assert leaner.step == plan.step and leaner.peak < plan.peak
        plan = leaner
    assert plan.peak < 18.5 * GIB


@pytest.mark.parametrize("layers", [1, 5, 32])
def test_a_mix_is_spread_evenly(layers):
    keep, lean = policies()["keep"], policies()["mlp+all"]
    for count in range(layers + 1):
        mix = spread(keep, lean, count, layers)
        assert mix.count(keep) == count and len(mix) == layers
        if 0 < count < layers:
            gaps = [i for i, policy in enumerate(mix) if policy == keep]
            assert max((b - a for a, b in itertools.pairwise(gaps)), default=0) <= -(-layers // count)


def test_leanest_is_no_more_than_any_pure_plan():
    step = Step(LLAMA_8B, Job(bits=4), 4, 2048)
    assert leanest(step).peak <= min(all_of(name, step).peak for name in LADDER)
    assert leanest(step, host=False).host == 0


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * GIB), ("24", 24 * GIB), (8, 8 * GIB), ("80 GB", 80 * 10**9), ("1.5g", GIB * 3 // 2)]
)
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == device_budget(text) == size


@pytest.mark.parametrize("text", ["much", "-3", "0", "24 GiBs", ""])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(ConfigError, match="not an amount"):
        parse_bytes(text)


def test_architectures_that_are_not_planned_for():
    with pytest.raises(ConfigError, match="cannot be planned"):
        Shape.of({"model_type": "mamba"})
    with pytest.raises(ConfigError, match="optimizer"):
        Job(optim="lion_of_the_day")
