"""views="auto": the choice itself, by arithmetic; and runs that make it, resume behind it, and share it."""

import copy
import dataclasses
import math

import pytest
import torch
from feature_cases import Pictures, small_net, train
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from freezeout_ext import FeatureCache, FreezeOut
from freezeout_ext.features import auto
from freezeout_ext.features.auto import Measured, best_views, score, seconds
from freezeout_ext.features.views import MOST_VIEWS

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
ROW_BYTES = 8 * 8 * 6 * 4  # behind small_net's first layer

times = st.floats(1e-7, 1.0)
measurements = st.builds(
    Measured, prefix=times, wait=st.floats(0, 0.1), rest=times, gather=times, before=st.floats(0, 50),
    epochs=st.floats(0.01, 60), left=st.floats(0, 60), frozen=st.floats(0, 1), fit=st.integers(1, 20),
)  # fmt: skip


@given(measurements)
def test_never_more_views_than_fit_or_than_epochs_are_left_and_none_costs_less(m):
    views = best_views(m)
    allowed = range(min(m.fit, math.floor(m.epochs), MOST_VIEWS) + 1)
    assert views in allowed
    assert all(score(m, views) <= score(m, other) for other in allowed)


@given(measurements, st.integers(1, 20))
def test_more_room_is_never_worse_and_changes_nothing_where_it_is_not_needed(m, fit):
    less = dataclasses.replace(m, fit=min(fit, m.fit))
    assert score(m, best_views(m)) <= score(m, best_views(less))
    if best_views(m) <= less.fit:
        assert best_views(less) == best_views(m)


@given(measurements, times)
def test_nothing_is_kept_where_reading_takes_longer_than_loading_and_computing(m, more):
    assert best_views(dataclasses.replace(m, gather=m.prefix + m.wait + more)) == 0


def simulated(m, views):
    """The run's seconds, epoch by epoch."""
    total, part = m.before * (m.wait + 3 * m.prefix + m.rest), 0.0
    steps = 1000
    for i in range(steps):
        epoch, part = m.epochs * i / steps, m.epochs / steps
        fills = not views or epoch < views
        total += part * ((m.wait + m.prefix if fills else m.gather) + m.rest)
    return total


@given(measurements, st.integers(0, MOST_VIEWS))
def test_the_seconds_of_a_run_are_those_of_its_epochs(m, views):
    # A view that is filled ends within one of the simulation's thousand steps.
    slack = m.epochs / 1000 * (m.wait + m.prefix + m.gather)
    assert abs(seconds(m, views) - simulated(m, views)) <= slack + 1e-9 * seconds(m, views)


def of_measured(fill, read, frozen, epochs=8.0):
    gather = 0.02
    rest = read - gather
    return Measured(fill - rest, 0.0, rest, gather, 0.0, epochs, epochs - 1, frozen, 20)


def test_it_takes_what_was_ahead_at_equal_cost_in_the_runs_it_is_made_from():
    # docs/measured.md, "Fine-tuning between classes": costs of an epoch solved from those of K = 1 and K = 4.
    # First 6 of 9: K = 1, 2, 4 are ahead by +0.53, +0.02, -0.42. First 4: K = 1 by -0.33, K = 4 by +0.44.
    assert best_views(of_measured(fill=0.68, read=0.28, frozen=6 / 9)) == 1
    assert best_views(of_measured(fill=0.80, read=0.48, frozen=4 / 9)) in (3, 4)
    # The longer the run, the more often each view is shown.
    assert best_views(of_measured(fill=0.80, read=0.48, frozen=4 / 9, epochs=2.0)) == 1
    assert best_views(of_measured(fill=0.80, read=0.48, frozen=4 / 9, epochs=30.0)) == MOST_VIEWS


def measuring(monkeypatch, **changes):
    """What is measured is given: the clock decides nothing. Rooms and epochs are the run's own."""
    real = auto.Choice._measure

    def measure(self):
        self._forwards.seconds = lambda name: 1e-3 if name == "prefix" else 1e-6
        if self._step is not None:
            self._step.add(5e-3 * auto.STEPS, auto.STEPS)
            self._step._calls = 1
        found = real(self)
        if found is not None:
            found = dataclasses.replace(found, **{"wait": 0.0, "rest": 4e-3, "gather": 1e-6, **changes})
        known.append(found)
        return found

    known = []
    monkeypatch.setattr(auto.Choice, "_measure", measure)
    return known


@pytest.mark.parametrize("store", ["host", "disk"])
@pytest.mark.parametrize("dtype", [None, torch.int8])
@given(epochs=st.integers(1, 9), start=st.integers(0, 2), rows=st.sampled_from([None, 5, 11, 30, 60, 1000]))
@example(epochs=8, start=1, rows=None)
@example(epochs=8, start=2, rows=30)
@settings(max_examples=3)
def test_a_run_with_auto_is_the_run_on_the_same_views_without_the_cache(
    tmp_path_factory, store, dtype, epochs, start, rows
):
    torch.manual_seed(0)
    model, dataset, common = small_net(), Pictures(11), {"epochs": epochs, "batch_size": 4, "views": "auto"}
    limit = None if rows is None else rows * ROW_BYTES + 11 * MOST_VIEWS * 16
    where = str(tmp_path_factory.mktemp("store")) if store == "disk" else store
    found = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        known = measuring(monkeypatch, frozen=0.2)
        # Where none are worth keeping what is kept is given up, which a run that keeps nothing cannot show.
        monkeypatch.setattr(auto, "best_views", lambda m: max(1, best_views(m)))
        for cached in (True, False):
            if not cached:  # where nothing is kept nothing is measured
                monkeypatch.setattr(auto.Choice, "_measure", lambda *_: known.pop(0) if known else None)
            torch.manual_seed(5)
            found.append(
                train(
                    copy.deepcopy(model), dataset, cached=cached, start_frozen=start, t_0=0.4, **common,
                    cache_arguments={"store": where, "limit": limit, "dtype": dtype} if cached else {},
                )
            )  # fmt: skip
    (losses, cache, _), (ever, other, _) = found
    tolerance = CLOSE if dtype is None else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(ever), **tolerance)
    report = cache.report()
    assert report.views == other.report().views <= max(1, epochs)
    assert limit is None or report.bytes <= limit
    assert report.rows <= 11 * report.views
    cache.close()


def run(model, dataset, cache, epochs, state=None):
    """-> losses of these of 8 epochs."""
    return train(model, dataset, cache=cache, epochs=epochs, of_epochs=8, t_0=1.0, state=state)[0]


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_that_resumes_takes_the_views_of_the_run_that_never_stopped(tmp_path, monkeypatch, stop):
    # stop = 1: before the decision, from what was measured; later: the decision itself.
    measuring(monkeypatch, frozen=0.2)
    torch.manual_seed(0)
    start, dataset = small_net(), Pictures(32)
    whole = FeatureCache(dataset, views="auto", measure=False)
    losses = run(copy.deepcopy(start), dataset, whole, range(8))
    assert whole.report().views > 1
    first = FeatureCache(dataset, views="auto", store=tmp_path, measure=False)
    state = []
    before = run(copy.deepcopy(start), dataset, first, range(stop), state)
    first.close()
    monkeypatch.setattr(auto.Choice, "_measure", lambda *_: None)
    second = FeatureCache(dataset, views="auto", store=tmp_path, measure=False)
    after = run(copy.deepcopy(start), dataset, second, range(stop, 8), state)
    assert before + after == losses
    assert second.report().views == whole.report().views
    # What the folder holds is not computed again, but for the batch that is watched.
    assert second.report().misses <= 32 * (whole.report().views - min(stop, whole.report().views)) + 8


def test_another_run_takes_what_a_folder_holds_and_says_so(tmp_path, monkeypatch):
    measuring(monkeypatch, frozen=0.2)
    torch.manual_seed(0)
    start, dataset = small_net(), Pictures(32)
    first = FeatureCache(dataset, views="auto", store=tmp_path, measure=False)
    run(copy.deepcopy(start), dataset, first, range(8))
    rows = first.report().rows
    first.close()
    second = FeatureCache(dataset, views="auto", store=tmp_path, measure=False)
    run(copy.deepcopy(start), dataset, second, range(2))
    assert second.report().rows == rows and second.report().misses <= 8
    assert any("was decided for" in note for note in second.report().notes)
    with pytest.raises(ValueError, match="differs in views"):
        FeatureCache(dataset, views=2, store=tmp_path)


def test_the_report_says_how_many_views_and_why_by_the_clock():
    torch.manual_seed(0)
    _, cache, _ = train(small_net(), Pictures(64), epochs=10, batch_size=8, views="auto", start_frozen=1, t_0=1.0)
    (note,) = [note for note in cache.report().notes if note.startswith("views: ")]
    assert "9.0 epochs were left" in note and "us to read" in note
    assert note.startswith((f"views: {cache.report().views} of each", "views: none are worth keeping"))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_epochs_that_are_left_are_counted_in_batches_under_gradient_accumulation(monkeypatch, accumulation):
    found = []
    monkeypatch.setattr(auto, "best_views", lambda m: found.append(m) or 1)
    measuring(monkeypatch)
    model, cache = small_net(), FeatureCache(Pictures(64), views="auto", measure=False)
    loader = cache.loader(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    total = 10 * len(loader) // accumulation
    freezeout = FreezeOut(model, optimizer, total_steps=total, start_frozen=1, t_0=1.0, cache=cache)
    for _ in range(2):
        for i, (inputs, targets, keys) in enumerate(loader):
            with cache.samples(keys):
                nn.functional.cross_entropy(model(inputs), targets).backward()
            if i % accumulation == accumulation - 1:
                optimizer.step()
                optimizer.zero_grad()
                freezeout.step()
    (m,) = found
    assert (m.left, m.epochs, m.before, m.fit) == (9.0, 10.0, 0.0, MOST_VIEWS)


def test_where_none_are_worth_keeping_each_epoch_is_fresh_until_the_next_freeze(monkeypatch):
    chosen = iter([0, 2])
    monkeypatch.setattr(auto, "best_views", lambda m: next(chosen))
    measuring(monkeypatch)
    shown = []

    def on_epoch(epoch, freezeout, cache):
        shown.append(cache.report().hits)

    model, dataset = small_net(), Pictures(32)
    _, cache, _ = train(model, dataset, epochs=8, views="auto", start_frozen=1, t_0=0.5, on_epoch=on_epoch)
    notes = cache.report().notes
    assert any("none are worth keeping until the next freeze" in note for note in notes)
    assert any(note.startswith("views: 2 of each") for note in notes), notes
    assert shown[2] == shown[3] == 0 and cache.report().hits + cache.report().pushed > 0


def two_processes(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        # The second process measures what would make it keep nothing, and has room for less.
        measuring(monkeypatch, frozen=0.2, **({"prefix": 1e-9, "fit": 3} if rank else {}))
        torch.manual_seed(0)
        cache = FeatureCache(Pictures(32), views="auto", measure=False)
        run(small_net(), None, cache, range(8))
        torch.save((cache.report().views, cache.report().rows), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_all_processes_take_as_many_views(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=two_processes, args=(rank, str(tmp_path))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [(3, 48), (3, 48)]
