"""Schedule against tables worked out by hand, and its laws as properties."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freezeout_ext.schedule import Schedule

# L = 4, t_0 = 0.5: the values before the power are 1/2, 5/8, 3/4, 7/8, 1.
HAND_TABLE = {
    "linear": [1 / 2, 5 / 8, 3 / 4, 7 / 8, 1],
    "squared": [1 / 4, 25 / 64, 9 / 16, 49 / 64, 1],
    "cubic": [1 / 8, 125 / 512, 27 / 64, 343 / 512, 1],
    1.5: [0.5**1.5, 0.625**1.5, 0.75**1.5, 0.875**1.5, 1],
}


@pytest.mark.parametrize("how_scale", HAND_TABLE)
def test_t_and_milestones_by_hand(how_scale):
    schedule = Schedule(5, 512, t_0=0.5, how_scale=how_scale)
    assert [schedule.t(i) for i in range(5)] == pytest.approx(HAND_TABLE[how_scale], rel=1e-15)
    # Milestones are rounded to 1e-6 of a step.
    assert [schedule.milestone(i) for i in range(5)] == pytest.approx(
        [512 * t for t in HAND_TABLE[how_scale]], abs=1e-6
    )


def test_paper_default_is_cubed_after_the_interpolation():
    assert Schedule(20, 1000).t(0) == pytest.approx(0.512, rel=1e-15)
    assert Schedule(20, 1000).t(10) == pytest.approx((0.8 + 0.2 * 10 / 19) ** 3, rel=1e-15)


def test_learning_rate_by_hand():
    schedule = Schedule(3, 100, t_0=0.5, how_scale="linear")  # t = 0.5, 0.75, 1; milestones 50, 75, 100
    assert schedule.lr_factor(0, 0) == 2.0
    assert schedule.lr_factor(0, 25) == pytest.approx(1.0, rel=1e-15)
    assert schedule.lr_factor(0, 49) == pytest.approx(1 + math.cos(math.pi * 0.98), rel=1e-15)
    assert schedule.lr_factor(0, 50) == 0.0
    assert schedule.lr_factor(1, 25) == pytest.approx(0.5 * (1 + 0.5) / 0.75, rel=1e-15)  # cos(pi/3) = 1/2
    assert schedule.lr_factor(2, 50) == pytest.approx(0.5, rel=1e-15)
    assert schedule.lr_factor(2, 100) == 0.0
    unscaled = Schedule(3, 100, t_0=0.5, how_scale="linear", scale_lr=False)
    assert [unscaled.lr_factor(i, 0) for i in range(3)] == [1.0, 1.0, 1.0]


def test_frozen_sets_by_hand():
    schedule = Schedule(3, 100, t_0=0.5, how_scale="linear")
    assert [schedule.num_frozen(step) for step in (0, 49, 50, 74, 75, 99, 100, 10**6)] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert [schedule.next_milestone(step) for step in (0, 49, 50, 74, 75, 100)] == [50, 50, 75, 75, None, None]


def test_a_milestone_on_a_step_is_not_pushed_behind_it_by_rounding():
    assert 0.55 * 100 > 55
    schedule = Schedule(11, 100, t_0=0.5, how_scale="linear")
    assert schedule.milestone(1) == 55.0
    assert schedule.next_milestone(54) == 55


def test_t_0_of_one_freezes_nothing():
    schedule = Schedule(4, 10, t_0=1.0)
    assert schedule.num_frozen(10**9) == 0
    assert schedule.next_milestone(0) is None
    for step in range(10):
        assert {schedule.lr_factor(i, step) for i in range(4)} == {0.5 * (1 + math.cos(math.pi * step / 10))}


def test_single_layer_never_freezes():
    schedule = Schedule(1, 10, t_0=0.5)
    assert schedule.t(0) == 1.0
    assert schedule.num_frozen(10) == 0


def test_warmup_rises_to_the_unwarmed_peak():
    schedule = Schedule(3, 100, t_0=0.5, how_scale="linear", warmup_steps=9)
    assert [schedule.lr_factor(0, step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0], rel=1e-15)
    assert max(schedule.lr_factor(0, step) for step in range(100)) == 2.0
    # Half of the way from the end of the warm-up to the milestone.
    assert schedule.lr_factor(0, 29.5) == pytest.approx(1.0, rel=1e-15)


def test_snapping_keeps_the_summed_active_time():
    free = Schedule(21, 10_000)
    snapped = Schedule(21, 10_000, max_transitions=3)
    times = [snapped.t(i) for i in range(21)]
    assert len(set(times[:-1])) == 3 and times[-1] == 1.0
    assert math.fsum(times) == pytest.approx(math.fsum(free.t(i) for i in range(21)), rel=1e-14)
    assert len({snapped.num_frozen(step) for step in range(10_000)}) == 4
    assert Schedule(21, 10_000, max_transitions=20).t(7) == free.t(7)


def test_the_rule_counts_the_layers_that_are_left():
    left, whole = Schedule(4, 40, t_0=0.4), Schedule(7, 40, t_0=0.4, start_frozen=3)
    assert [whole.t(i) for i in range(7)] == [0, 0, 0, *(left.t(i) for i in range(4))]
    for step in range(41):
        assert whole.num_frozen(step) == 3 + left.num_frozen(step)
        assert [whole.lr_factor(i, step) for i in range(3, 7)] == [left.lr_factor(i, step) for i in range(4)]
        assert [whole.lr_factor(i, step) for i in range(3)] == [0, 0, 0]
    snapped = Schedule(7, 40, t_0=0.4, start_frozen=3, max_transitions=2)
    assert [snapped.t(i) for i in range(3)] == [0, 0, 0] and len({snapped.t(i) for i in range(3, 6)}) == 2


def test_milestones_stand_in_place_of_the_rule():
    schedule = Schedule(5, 40, milestones=[0, 0.25, 0.25, 0.9, 1])
    assert [schedule.milestone(i) for i in range(5)] == [0, 10, 10, 36, 40]
    assert [schedule.num_frozen(step) for step in (0, 9, 10, 35, 36, 40)] == [1, 1, 3, 3, 4, 4]
    assert Schedule(5, 40, milestones=[1] * 5).num_frozen(10**6) == 0
    behind = Schedule(5, 40, start_frozen=2, milestones=(0.5, 0.75, 1))
    assert [behind.milestone(i) for i in range(5)] == [0, 0, 20, 30, 40]
    assert Schedule(5, 40, milestones=[0.1, 0.3, 0.5, 0.9, 1], max_transitions=2).milestone(0) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 0}, "num_layers must be >= 1, got 0"),
        ({"total_steps": 0}, "total_steps must be >= 1, got 0"),
        ({"t_0": 0.0}, r"t_0 must be in \(0, 1\], got 0.0"),
        ({"t_0": 1.1}, r"t_0 must be in \(0, 1\], got 1.1"),
        ({"t_0": math.nan}, r"t_0 must be in \(0, 1\], got nan"),
        (
            {"how_scale": "quartic"},
            "how_scale must be one of linear, squared, cubic or a positive power, got 'quartic'",
        ),
        ({"how_scale": -1}, "how_scale .* got -1"),
        ({"how_scale": math.inf}, "how_scale .* got inf"),
        ({"max_transitions": 0}, "max_transitions must be >= 1, got 0"),
        ({"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
        ({"warmup_steps": 52}, "warmup_steps must end before the first layer freezes at step 51.2, got 52"),
        ({"milestones": [0.5, 1]}, "one entry for each of the 3 layers, got 2"),
        (
            {"milestones": [0.5, 1], "start_frozen": 2},
            "each of the 1 layers behind the 2 of start_frozen, got 2",
        ),
        (
            {"milestones": [0.5, 0.4, 1]},
            "must not fall, got 0.5 and then 0.4 for layer 1",
        ),
        (
            {"milestones": [0.5, 0.6, 0.9]},
            r"must end with 1 \(the last layer never freezes\), got 0.9",
        ),
        (
            {"milestones": [0.5, 1.5, 1]},
            r"fractions in \[0, 1\], got 1.5 for layer 1",
        ),
        (
            {"milestones": [float("nan"), 1, 1]},
            r"fractions in \[0, 1\], got nan for layer 0",
        ),
        (
            {"milestones": [0.5, 0.6, 1], "t_0": 0.5},
            "t_0 has no meaning beside them",
        ),
        ({"start_frozen": 3}, "must leave a layer to train, got 3 of 3 layers"),
        (
            {"start_frozen": 1, "t_0": 0.1, "warmup_steps": 5},
            "first layer freezes at step 0.1, got 5",
        ),
    ],
)
def test_bad_values_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{"num_layers": 3, "total_steps": 100, **arguments})


schedules = st.builds(
    Schedule,
    num_layers=st.integers(1, 60),
    total_steps=st.integers(1, 10**6),
    t_0=st.floats(0.05, 1.0),
    how_scale=st.sampled_from(["linear", "squared", "cubic"]) | st.floats(0.1, 6.0),
    scale_lr=st.booleans(),
    max_transitions=st.none() | st.integers(1, 70),
)


@given(schedules)
def test_milestones_rise_with_the_layer(schedule):
    milestones = [schedule.milestone(i) for i in range(schedule.num_layers)]
    assert milestones == sorted(milestones)
    assert milestones[-1] == schedule.total_steps
    assert all(m > 0 for m in milestones)


@given(schedules, st.integers(0, 2 * 10**6))
def test_the_frozen_layers_are_a_prefix_and_the_last_never_freezes(schedule, step):
    frozen = schedule.num_frozen(step)
    assert 0 <= frozen < schedule.num_layers
    assert all(schedule.lr_factor(i, step) == 0 for i in range(frozen))
    # 1 + cos underflows within 1e-8 of a milestone.
    if (
        all(abs(step - schedule.milestone(i)) > 1e-3 for i in range(schedule.num_layers))
        and step < schedule.total_steps
    ):
        assert all(schedule.lr_factor(i, step) > 0 for i in range(frozen, schedule.num_layers))


@given(schedules, st.integers(0, 10**6))
def test_next_milestone_is_where_num_frozen_grows(schedule, step):
    following = schedule.next_milestone(step)
    if following is None:
        assert schedule.num_frozen(10**9) == schedule.num_frozen(step)
    else:
        assert schedule.num_frozen(following - 1) == schedule.num_frozen(step) < schedule.num_frozen(following)


@given(schedules, st.integers(0, 59), st.floats(0, 1), st.integers(0, 50))
def test_the_factor_is_continuous_and_ends_at_zero_at_its_milestone(schedule, i, where, warmup):
    i = min(i, schedule.num_layers - 1)
    if warmup < schedule.milestone(0):
        schedule = Schedule(**{**vars_of(schedule), "warmup_steps": warmup})
    milestone = schedule.milestone(i)
    peak = 1 / schedule.t(i) if schedule.scale_lr else 1.0
    assert schedule.lr_factor(i, milestone) == 0.0
    # Slopes: at most pi/2 peaks per cosine length, one peak per warm-up step.
    slope = peak * max(math.pi / 2 / (milestone - schedule.warmup_steps), 1 / (schedule.warmup_steps + 1))
    step, delta = where * milestone, 1e-6 * milestone
    jump = abs(schedule.lr_factor(i, step + delta) - schedule.lr_factor(i, step))
    assert jump <= slope * delta + 1e-9 * peak


def vars_of(schedule: Schedule) -> dict:
    return {name: getattr(schedule, name) for name in schedule.__dataclass_fields__}
