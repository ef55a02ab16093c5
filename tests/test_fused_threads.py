"""One optimizer, a second Python thread that changes what it holds, odd containers: no crash, in a process apart."""

import subprocess
import sys

import pytest

from freezeout_ext import native

pytestmark = pytest.mark.skipif(native.C is None, reason=f"no compiled half: {native.import_error}")

START = """
import collections, itertools, sys, threading, time
import torch
from torch import nn
from freezeout_ext import FusedAdamW, FusedSGD
torch.set_num_threads(1)
sys.setswitchinterval(1e-5)
ps = [nn.Parameter(torch.ones(40)) for _ in range(30)]
"""
TWO_THREADS = """
def race(cls, options, other):
    ps = [nn.Parameter(torch.ones(40)) for _ in range(30)]
    optimizer = cls([{"params": [p], "lr": torch.tensor(1e-3)} for p in ps], **options)
    end, errors = time.monotonic() + 0.6, []
    def repeat(call):
        while time.monotonic() < end:
            try:
                call()
            except RuntimeError as error:
                errors.append(str(error))
    def pop_states():
        for p in ps:
            optimizer.state.pop(p, None)
    def swap():
        for p in ps:
            p.data = p.data.clone()
    def regroup():
        optimizer.param_groups[0]["params"] = list(optimizer.param_groups[0]["params"])
    for p in ps:
        p.grad = torch.ones(40)
    optimizer.step()
    others = {"step": optimizer.step, "pop_states": pop_states, "swap": swap, "regroup": regroup}
    calls = (optimizer.step, others[other])
    threads = [threading.Thread(target=repeat, args=(call,)) for call in calls]
    [t.start() for t in threads]
    [t.join() for t in threads]
    expected = ("must not run in two threads at once", "could not prepare its step", "dictionary changed size",
                "dictionary keys changed")
    assert all(any(known in error for known in expected) for error in errors), set(errors)

# Not a thread that sets or drops gradients during a step: torch 2.13's own for-loop crashes there too.
for other in ("step", "pop_states", "swap", "regroup"):
    race(FusedSGD, {"momentum": 0.9}, other)
    race(FusedAdamW, {}, other)
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


def test_a_second_thread_that_steps_or_replaces_states_data_or_lists_crashes_nothing():
    run(TWO_THREADS)


ONE_STEP = """
for cls, options in ((FusedSGD, {{"lr": 0.1, "momentum": 0.9}}), (FusedAdamW, {{"lr": 0.1, "weight_decay": 0.0}})):
    optimizer = cls(ps, **options)
    for step in range(3):
        for p in ps:
            p.data.fill_(1.0)
            p.grad = torch.ones(40)
        optimizer.state.clear()
        if step == 1:  # prepared once already
            group = optimizer.param_groups[0]
            {change}
        optimizer.step()
        assert all(((p - 0.9).abs() < 1e-6).all() for p in ps)
    assert {reason!r} in optimizer.native_report()["group 0, parameter 0"], optimizer.native_report()
"""
CONTAINERS = {
    "a tuple": ('group["params"] = tuple(ps)', "params are a tuple, not a list"),
    "a set": ('group["params"] = set(ps)', "params are a set, not a list"),
    "a deque": ('group["params"] = collections.deque(ps)', "params are a deque, not a list"),
    "dict values": ('group["params"] = dict(enumerate(ps)).values()', "params are a dict_values, not a list"),
    "ParameterList": ('group["params"] = nn.ParameterList(ps)', "params are a ParameterList, not a list"),
    "UserDict": ("optimizer.param_groups[0] = collections.UserDict(group)", "group is a UserDict, not a dict"),
    "groups in a tuple": (
        "optimizer.param_groups = tuple(optimizer.param_groups)",
        "param_groups is a tuple, not a list",
    ),
    "UserDict state": ("optimizer.state = Missing()", "state is a Missing, not a dict"),
}


def test_other_containers_are_torch_s_and_reported():
    missing = """
class Missing(collections.UserDict):
    def __missing__(self, key):
        self[key] = {}
        return self[key]
"""
    run(missing + "".join(ONE_STEP.format(change=change, reason=reason) for change, reason in CONTAINERS.values()))
