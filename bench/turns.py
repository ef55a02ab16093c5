"""Rivals that take turns in one process, so that what slows the machine slows all of them."""

import time
from collections.abc import Callable

import torch

Call = Callable[[], object]


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds: by the wall, behind what a GPU has still to do; the CPU time of a thread that works alone."""

    def behind_the_device() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    if device.type == "cuda":
        return behind_the_device
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def in_turns(
    calls: dict[str, Call],
    device: torch.device,
    *,
    rounds: int,
    seconds: float = 0.0,
    repeats: int = 1,
    before: Callable[[Call], object] = lambda call: call(),
) -> dict[str, list[float]]:
    """Seconds of each call, one value a turn: the mean over `repeats` calls in a row.

    Args:
        rounds: each call has so many turns, and more until `seconds` are over.
        before: is called with the call before each of its turns. By default it calls it, so that its data is in caches.
    """
    now = clock(device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    end, done = time.perf_counter() + seconds, 0
    while done < rounds or time.perf_counter() < end:
        order = list(calls.items())
        for name, call in order if done % 2 == 0 else reversed(order):
            before(call)
            start = now()
            for _ in range(repeats):
                call()
            times[name].append((now() - start) / repeats)
        done += 1
    return times
