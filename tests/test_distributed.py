"""Two gloo processes on the CPU: DDP follows the transitions, FSDP2 too, and a lost rank is a clear error.

The processes start once and run all scenarios; each test looks at what its scenario returned.
"""

import copy
import datetime
import gc
import os
import signal
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from test_freezeout import assert_same, small_net
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from freezeout_ext.freezeout import FreezeOut
from freezeout_ext.fused import FusedSGD

WORLD, TOTAL_STEPS = 2, 16
SCHEDULE = {"total_steps": TOTAL_STEPS, "t_0": 0.3, "how_scale": "linear"}

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo backend"
)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(2, width)

    def forward(self, x):
        return x + F.relu(self.norm(self.conv(x)))


def group_norm_net():
    """No batch norm: a rank's half batch gives the same function as the whole batch."""
    torch.manual_seed(0)
    blocks = [Block(4) for _ in range(4)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *blocks, head).double()


def batch(step, dtype=torch.float64, size=8):
    generator = torch.Generator().manual_seed(1000 + step)
    inputs = torch.randn(size, 1, 8, 8, generator=generator, dtype=dtype)
    return inputs, torch.randint(0, 10, (size,), generator=generator)


def my_part(tensors):
    return [tensor.chunk(WORLD)[dist.get_rank()] if dist.is_initialized() else tensor for tensor in tensors]


def sgd(model, kind=torch.optim.SGD):
    return kind(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)


def train(net, optimizer, freezeout, steps, dtype=torch.float64):
    for step in steps:
        inputs, targets = my_part(batch(step, dtype))
        F.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        freezeout.step()


def single_process(**schedule):
    model = group_norm_net()
    optimizer = sgd(model)
    train(model, optimizer, FreezeOut(model, optimizer, **{**SCHEDULE, **schedule}), range(TOTAL_STEPS))
    return model.state_dict()


# What the two processes run; each returns something picklable


def count_bytes(counted, bucket):
    """A communication hook: averages, and counts the bytes it is handed."""
    counted.append(bucket.buffer().numel() * bucket.buffer().element_size())
    work = dist.all_reduce(bucket.buffer().div_(WORLD), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def followed(schedule=None, counted=None, given=True, kind=torch.optim.SGD, **ddp_arguments):
    from freezeout_ext.integrations.distributed import DDPFollower

    model = group_norm_net()
    optimizer = sgd(model, kind)
    freezeout = FreezeOut(model, optimizer, **{**SCHEDULE, **(schedule or {})})
    ddp = DDP(model, **ddp_arguments)
    if counted is not None:
        ddp.register_comm_hook(counted, count_bytes)
    return model, optimizer, freezeout, ddp, DDPFollower(freezeout, ddp if given else None)


def scenario_equals_single(folder):
    results = {}
    for name, arguments in {
        "plain": {},
        "found by itself": {"given": False},
        "bucket views": {"gradient_as_bucket_view": True},
        "fused, bucket views": {"kind": FusedSGD, "gradient_as_bucket_view": True, "bucket_cap_mb": 0.001},
        "static graph": {"static_graph": True},
        "small buckets": {"bucket_cap_mb": 0.0005},
    }.items():
        model, optimizer, freezeout, ddp, follower = followed(**arguments)
        train(ddp, optimizer, freezeout, range(TOTAL_STEPS))
        results[name] = (model.state_dict(), follower.traffic)
        del ddp, follower
    return results


def scenario_counted_bytes(folder):
    counted = []
    model, optimizer, freezeout, ddp, follower = followed(counted=counted)
    active, seen = [], []
    for step in range(TOTAL_STEPS):
        counted.clear()
        active.append(sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad))
        train(ddp, optimizer, freezeout, [step])
        seen.append(sum(counted))
    return model.state_dict(), active, seen, follower.traffic


def scenario_batch_norm(folder):
    from freezeout_ext.integrations.distributed import DDPFollower

    model = small_net()
    optimizer = sgd(model)
    freezeout = FreezeOut(model, optimizer, **SCHEDULE)
    ddp = DDP(model)
    follower = DDPFollower(freezeout)
    train(ddp, optimizer, freezeout, range(TOTAL_STEPS - 1), torch.float32)
    frozen = {id(m) for layer in freezeout.layers[: freezeout.num_frozen] for m in layer.submodules}
    buffers = {
        f"{name}.{buffer_name}": buffer
        for name, module in model.named_modules()
        if id(module) in frozen
        for buffer_name, buffer in module.named_buffers(recurse=False)
    }
    return dict(model.named_parameters()), buffers, follower.traffic


def scenario_not_followed(folder):
    model = group_norm_net()
    optimizer = sgd(model)
    freezeout = FreezeOut(model, optimizer, **SCHEDULE)
    ddp = DDP(model)
    try:
        train(ddp, optimizer, freezeout, range(TOTAL_STEPS))
    except RuntimeError as error:
        with torch.no_grad():
            ddp(my_part(batch(0))[0])  # evaluation needs no reducer
        again = DDP(model, init_sync=False)
        train(again, optimizer, freezeout, [freezeout.step_count])
        return str(error), freezeout.step_count


def scenario_wraps_once(folder):
    _, optimizer, freezeout, ddp, follower = followed({"max_transitions": 1})
    train(ddp, optimizer, freezeout, range(TOTAL_STEPS))
    return [(t.step, t.num_frozen) for t in follower.traffic], [t.step for t in freezeout.transitions]


def scenario_other_schedule(folder):
    try:
        followed({"t_0": 0.3 + 0.1 * dist.get_rank()})
    except ValueError as error:
        return str(error)


def scenario_accumulation(folder):
    model, optimizer, freezeout, ddp, _ = followed()
    for step in range(TOTAL_STEPS):
        inputs, targets = my_part(batch(step))
        with ddp.no_sync():
            (F.cross_entropy(ddp(inputs[:2]), targets[:2]) / 2).backward()
        (F.cross_entropy(ddp(inputs[2:]), targets[2:]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        freezeout.step()
    return model.state_dict()


def scenario_resume(folder):
    model, optimizer, freezeout, ddp, _ = followed()
    train(ddp, optimizer, freezeout, range(9))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), freezeout.state_dict()])
    train(ddp, optimizer, freezeout, range(9, TOTAL_STEPS))
    expected = model.state_dict()

    # DDP is built before the layers freeze.
    model, optimizer, freezeout, ddp, follower = followed()
    freezeout.load_state_dict(saved[2])
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(ddp, optimizer, freezeout, range(9, TOTAL_STEPS))
    return expected, model.state_dict(), follower.traffic


def sharded(kind=torch.optim.SGD):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    model = group_norm_net()
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in list(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = sgd(model, kind)
    return model, optimizer, FreezeOut(model, optimizer, **SCHEDULE)


def scenario_fsdp(folder):
    results = []
    for kind in (torch.optim.SGD, FusedSGD):
        model, optimizer, freezeout = sharded(kind)
        train(model, optimizer, freezeout, range(TOTAL_STEPS))
        results.append({name: p.full_tensor().detach() for name, p in model.state_dict().items()})
    return results, freezeout.num_frozen


def scenario_distributed_checkpoint(folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer, freezeout = sharded()
    train(model, optimizer, freezeout, range(9))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state, "freezeout": freezeout}, checkpoint_id=folder / "dcp")

    model, optimizer, freezeout = sharded()
    dcp.load({"freezeout": freezeout}, checkpoint_id=folder / "dcp")  # first: it decides which states there are
    weights, state = get_state_dict(model, optimizer)
    held = {"model": weights, "optimizer": state}
    dcp.load(held, checkpoint_id=folder / "dcp")
    set_state_dict(model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    resumed_at = freezeout.step_count, freezeout.num_frozen
    train(model, optimizer, freezeout, range(9, TOTAL_STEPS))
    return {name: p.full_tensor().detach() for name, p in model.state_dict().items()}, resumed_at


def scenario_zero(folder):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = group_norm_net()
    try:
        FreezeOut(model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1), **SCHEDULE)
    except TypeError as error:
        return str(error)


SCENARIOS = [function for name, function in dict(globals()).items() if name.startswith("scenario_")]


# Processes


def start(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )


def end():
    # gloo may abort at exit while a reducer lives.
    gc.collect()
    dist.destroy_process_group()


def run_scenarios(rank, folder):
    start(rank, folder)
    results = {}
    for scenario in SCENARIOS:
        try:
            results[scenario.__name__] = scenario(folder)
        except Exception:
            results[scenario.__name__] = traceback.format_exc()
            torch.save(results, folder / f"{rank}.pt")
            break  # the other rank may be inside a collective
        gc.collect()
        torch.save(results, folder / f"{rank}.pt")
    end()


def run_processes(target, folder, *arguments, seconds=100):
    """-> exit codes; whatever still runs after `seconds` is killed."""
    folder.mkdir(exist_ok=True)
    # One server imports torch, which takes longer than all that the processes do; each is forked from it.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed.fsdp"])
    processes = [context.Process(target=target, args=(rank, folder, *arguments)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenarios")
    codes = run_processes(run_scenarios, folder)
    found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]

    def of(name):
        parts = [rank_results.get(f"scenario_{name}", "not run") for rank_results in found]
        for part in parts:
            if isinstance(part, str) and ("Traceback" in part or part == "not run"):
                pytest.fail(f"{part} (exit codes {codes})")
        return parts

    return of


def assert_close(mine, theirs):
    # Float64; the ranks' halves are summed in another order than one process sums the whole batch.
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "name", ["plain", "found by itself", "bucket views", "fused, bucket views", "static graph", "small buckets"]
)
def test_ddp_gives_the_weights_of_one_process_with_the_same_global_batch(results, name):
    (first, traffic), (second, _) = (part[name] for part in results("equals_single"))
    assert_same(first, second)
    assert_close(first, single_process())
    assert [t.num_frozen for t in traffic] == [0, 1, 2, 3, 4, 5]


def test_traffic_falls_by_exactly_the_frozen_bytes(results):
    for weights, active, seen, traffic in results("counted_bytes"):
        assert seen == active  # at each step, as the communication hook was handed them
        assert len(set(active)) == 6
        at = {t.step: t.gradient_bytes for t in traffic}
        assert {step: active[step] for step in at} == at
        assert_close(weights, single_process())


def test_batch_norm_ranks_agree_and_frozen_buffers_are_no_longer_sent(results):
    (parameters, buffers, traffic), (their_parameters, their_buffers, _) = results("batch_norm")
    assert_same(parameters, their_parameters)
    assert len(buffers) > 6
    assert_same(buffers, their_buffers)
    assert traffic[0].buffer_bytes - traffic[-1].buffer_bytes == sum(b.nbytes for b in buffers.values()) > 0


def test_a_ddp_that_was_not_wrapped_again_is_an_error_on_every_rank(results):
    for message, steps in results("not_followed"):
        assert "must be wrapped again" in message and "DDPFollower" in message
        assert "12 parameters" not in message and "20 parameters" in message
        assert steps == 6  # five steps until the milestone at 0.3 * 16, one after wrapping again


def test_several_layers_are_wrapped_once(results):
    for traffic, transitions in results("wraps_once"):
        assert traffic == [(0, 0), (transitions[0], 5)] and len(transitions) == 1


def test_another_schedule_on_a_rank_is_an_error_on_all(results):
    for message in results("other_schedule"):
        assert "t_0 must be the same on all ranks" in message


def test_accumulated_gradients_under_no_sync(results):
    first, second = results("accumulation")
    assert_same(first, second)
    assert_close(first, single_process())


def test_resume_is_bit_identical_also_where_ddp_was_built_before_the_freeze(results):
    for expected, resumed, traffic in results("resume"):
        assert_same(expected, resumed)
        assert traffic[1].num_frozen == 2 and traffic[1].step == 9


def test_fsdp_follows_by_itself(results):
    for (weights, fused), num_frozen in results("fsdp"):
        assert num_frozen == 5
        assert_close(weights, single_process())
        assert_close(fused, weights)


def test_resume_through_distributed_checkpoint(results):
    for weights, resumed_at in results("distributed_checkpoint"):
        assert resumed_at == (9, 2)
        assert_close(weights, single_process())


def test_zero_redundancy_optimizer_is_refused_with_the_reason(results):
    for message in results("zero"):
        assert "ZeroRedundancyOptimizer" in message and "fully_shard" in message


# A lost rank


def run_until_killed(rank, folder):
    from freezeout_ext.integrations.distributed import LostRank, lost_rank_explained

    start(rank, folder)
    model, optimizer, freezeout, ddp, _ = followed()
    train(ddp, optimizer, freezeout, range(7))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.save([model.state_dict(), optimizer.state_dict(), freezeout.state_dict()], folder / "checkpoint.pt")
    try:
        with lost_rank_explained(lambda: freezeout.step_count):
            train(ddp, optimizer, freezeout, range(7, TOTAL_STEPS))
    except LostRank as error:
        (folder / "error.txt").write_text(str(error))
        os._exit(3)


def test_a_killed_rank_ends_the_others_with_a_clear_error_and_the_run_resumes(tmp_path: Path):
    assert run_processes(run_until_killed, tmp_path / "killed", seconds=60) == [3, -signal.SIGKILL]
    message = (tmp_path / "killed" / "error.txt").read_text()
    assert "lost contact with another rank in step 7" in message and "checkpoint" in message

    # With as many processes as are left (with two: scenario_resume).
    model = group_norm_net()
    optimizer = sgd(model)
    freezeout = FreezeOut(model, optimizer, **SCHEDULE)
    checkpoint = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=False)
    for part, state in zip((model, optimizer, freezeout), checkpoint, strict=True):
        part.load_state_dict(state)
    train(model, optimizer, freezeout, range(7, TOTAL_STEPS))
    assert_close(model.state_dict(), single_process())
