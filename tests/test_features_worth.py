"""Kept features never cost more than they give: by the maths of the decision, and by counting what layers compute."""

import copy
from contextlib import nullcontext

import pytest
from feature_cases import Pictures, small_net, train
from hypothesis import given, settings
from hypothesis import strategies as st

from freezeout_ext.features import moves
from freezeout_ext.features.worth import MARGIN, Left, Pace, Times, reason_against


class Run:
    """Costs of a run, sample by sample: `paid` runs all frozen layers each time, `kept` decides as the cache does.

    layers[i]: seconds of a sample in layer i. freezes[i]: the sample (of all that are shown) at which it freezes.
    """

    def __init__(self, layers, freezes, *, views, total, fill, gather, watch):
        self.layers, self.freezes, self.views, self.total = layers, freezes, views, total
        self.fill, self.gather, self.watch = fill, gather, watch

    def frozen(self, sample):
        return sum(f <= sample for f in self.freezes)

    def paid(self):
        return sum(sum(self.layers[: self.frozen(s)]) for s in range(self.total))

    def kept(self):
        seconds, frontier, rows, decided = 0.0, 0, {}, 0
        for s in range(self.total):
            n = self.frozen(s)
            if n > decided:
                decided = n
                times = Times(
                    layers=sum(self.layers[frontier:n]), fill=self.fill[n], gather=self.gather[n],
                    gathered=self.gather[frontier] if frontier else 0.0, watch=self.watch,
                )  # fmt: skip
                following = next((f for f in sorted(self.freezes) if f > s), self.total)
                left = Left(min(following, self.total) - s, self.total - s)
                if reason_against(times, left, self.views, self.views) is None:
                    frontier = n
                    seconds += self.watch
            view = s % self.views  # each view once in so many samples
            have = rows.get(view, 0)
            seconds += self.gather[have] if have else 0.0
            if frontier > have:
                seconds += sum(self.layers[have:frontier]) + self.fill[frontier]
                rows[view] = frontier
            seconds += sum(self.layers[max(have, frontier) : n])
        return seconds


@given(data=st.data())
@settings(max_examples=300)
def test_no_schedule_makes_keeping_dearer_than_paying(data):
    count = data.draw(st.integers(1, 6))
    total = data.draw(st.integers(1, 400))
    seconds = st.floats(0, 1e-3)
    run = Run(
        data.draw(st.lists(seconds, min_size=count, max_size=count)),
        sorted(data.draw(st.lists(st.integers(0, total), min_size=count, max_size=count))),
        views=data.draw(st.integers(1, 120)), total=total, watch=data.draw(st.floats(0, 0.02)),
        fill=[0.0, *data.draw(st.lists(seconds, min_size=count, max_size=count))],
        gather=[0.0, *data.draw(st.lists(seconds, min_size=count, max_size=count))],
    )  # fmt: skip
    assert run.kept() <= run.paid() + 1e-9


def test_long_phases_are_kept_whole_and_nearly_nothing_is_paid():
    # 4 layers of 1 ms freeze one by one, a view is seen ten times in each phase; a row takes 10 us to write or read.
    run = Run([1e-3] * 4, [0, 1000, 2000, 3000], views=100, total=4000, fill=[1e-5] * 5, gather=[1e-5] * 5, watch=0.01)
    assert run.kept() < 0.2 * run.paid()


def test_what_is_not_seen_again_is_not_kept_and_a_freeze_that_is_near_is_waited_for():
    times = Times(layers=1e-3, fill=1e-4, gather=1e-4, watch=0.05)
    assert "no" in reason_against(times, Left(100, 100), 100, 100) or ""
    assert reason_against(times, Left(1000, 1000), 100, 100) is None
    assert "the next layer freezes in 50 samples" in reason_against(times, Left(50, 1000), 100, 100)
    assert "until the end it saves" in reason_against(times, Left(150, 150), 100, 100)
    # Half of the views fit: half is saved, and reading more slowly than before counts.
    assert reason_against(times, Left(1000, 1000), 100, 50) is None
    assert reason_against(Times(layers=1e-3, gather=1e-3), Left(1000, 1000), 100, 100) is not None
    # What makes room runs again.
    assert reason_against(Times(layers=1e-3, again=9e-3), Left(1000, 1000), 100, 100) is not None
    assert MARGIN >= 1


def test_a_step_of_several_forwards_is_counted_whole():
    pace = Pace()
    for step, samples in ((0, 8), (0, 8)):
        pace.count(step, samples)
        assert pace.samples == 0  # more of this step may come
    for step, samples in ((1, 8), (1, 4), (2, 3), (3, 3)):
        pace.count(step, samples)
        assert pace.samples == 16


def computed(model, dataset, *, cached, decides, **arguments):
    """-> (samples that each module has computed, cache, transitions) of a run."""
    counts = {}

    def counting(name, module):
        forward = type(module).forward

        def counted(x, *rest):
            counts[name] = counts.get(name, 0) + len(x)
            return forward(module, x, *rest)

        return counted

    for name, module in model.named_children():
        if list(module.parameters()):
            # The class's own: the cache puts another forward on the module, and calls this one.
            module.forward = counting(name, module)
    with pytest.MonkeyPatch.context() as patch:
        if decides:
            for name, said in decides.items():
                patch.setattr(moves, name, said)
        _, cache, freezeout = train(
            model, dataset, cached=cached, cache_arguments={"measure": bool(decides)}, **arguments
        )
    return counts, cache, freezeout.transitions


def saying(layers, fill, gather, forward):
    """In place of `Weighing` and `trial`: these say these seconds at once."""

    class Said:
        samples, outputs = 1, []

        def __init__(self, modules, device):
            self.layers = layers * len(modules)

        def timed(self, samples):
            return nullcontext()

        def times(self):
            return self.layers, forward

    return {"Weighing": Said, "trial": lambda *_: (1, fill, gather)}


@given(
    views=st.integers(1, 3),
    batch_size=st.sampled_from([4, 5, 11]),
    start_frozen=st.integers(0, 2),
    t_0=st.sampled_from([0.2, 0.5, 0.8]),
    how_scale=st.sampled_from(["linear", "cubic"]),
    max_transitions=st.sampled_from([None, 1, 2]),
    epochs=st.integers(2, 6),
    decides=st.sampled_from([None, (1e-3, 0.0, 0.0, 0.0), (1e-3, 1e-4, 1e-4, 1e-3), (1e-3, 2e-3, 1e-4, 0.01)]),
)
@settings(max_examples=15)
def test_no_layer_computes_more_samples_than_without_the_cache_but_for_watches_and_spot_checks(
    views, batch_size, start_frozen, t_0, how_scale, max_transitions, epochs, decides
):
    dataset, model = Pictures(22), small_net()
    common = {
        "epochs": epochs, "batch_size": batch_size, "views": views, "start_frozen": start_frozen, "t_0": t_0,
        "how_scale": how_scale, "max_transitions": max_transitions, "prefix": "off",
    }  # fmt: skip
    said = saying(*decides) if decides else None
    ours, cache, transitions = computed(copy.deepcopy(model), dataset, cached=True, decides=said, **common)
    ever, _, _ = computed(copy.deepcopy(model), dataset, cached=False, decides=None, **common)
    watches = cache._forwards.watches
    assert watches <= len(transitions) + bool(start_frozen)
    # A watch computes the frozen layers once more, in two halves, and then the others from the kept rows.
    allowed = batch_size * (watches + cache.report().checks)
    for name, count in ever.items():
        assert ours[name] <= count + allowed, (name, ours, ever, str(cache.report()))
