"""The simulated CUDA device refuses what a device refuses: else the tests that run on it find nothing."""

import os

import pytest
import torch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(os.environ.get("FREEZEOUT_TESTS_CUDA") != "simulated", reason="the CUDA device is a real one"),
]


def captured(run, *, stream=None):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, stream=stream):
        run()
    return graph


def test_tensors_of_two_devices_are_not_mixed():
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        torch.ones(3, device="cuda") + torch.ones(3, device="cpu")


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.copy_(torch.zeros(3, device="cpu")),
        lambda x: x.nonzero(),
        lambda x: torch.cuda.synchronize(),
    ],
    ids=["item", "to the host", "from the host", "nonzero", "synchronize"],
)
def test_a_capture_that_waits_for_the_device_fails_as_a_whole(wait):
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match=r"CUDA error: operation (not permitted|failed)"):
        captured(lambda: wait(x))
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
            wait(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_capture_is_alone_and_not_on_the_default_stream():
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="must be captured on a non-default stream"):
        graph.capture_begin()
    with pytest.raises(RuntimeError, match="a capture is under way already"):
        captured(lambda: graph.capture_begin())


def test_a_replay_reads_and_writes_the_memory_of_its_capture():
    x, y = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    graph = captured(lambda: y.copy_(x * 2))
    assert torch.equal(y.cpu(), torch.zeros(3))  # a capture runs nothing
    x.fill_(5)
    graph.replay()
    assert torch.equal(y.cpu(), torch.full((3,), 10.0))


def test_a_graph_whose_memory_was_freed_does_not_replay():
    held, y = [torch.ones(3, device="cuda")], torch.zeros(3, device="cuda")
    graph = captured(lambda: y.copy_(held[0]))
    graph.replay()
    held.clear()
    with pytest.raises(RuntimeError, match="reads memory that was freed"):
        graph.replay()


def test_a_destroyed_graph_takes_the_workspace_of_its_stream_along():
    """https://github.com/pytorch/pytorch/issues/193402"""
    stream, x = torch.cuda.Stream(), torch.ones(2, 2, device="cuda")
    first, second = (captured(lambda: x.mm(x), stream=stream) for _ in range(2))
    second.replay()
    del first
    with pytest.raises(RuntimeError, match="cuBLAS workspace that was freed"):
        second.replay()


def test_new_memory_is_not_a_number():
    assert torch.empty(3, device="cuda").isnan().all()


def test_a_convolution_in_half_precision_sums_in_single():
    x, weight = torch.randn(2, 64, 4, 4), torch.randn(8, 64, 3, 3)
    x, weight = (t.half().cuda().requires_grad_() for t in (x, weight))
    y = torch.nn.functional.conv2d(x, weight, padding=1)
    y.sum().backward()
    wanted = torch.nn.functional.conv2d(x.detach().cpu().float(), weight.detach().cpu().float(), padding=1).half()
    assert y.dtype == x.grad.dtype == weight.grad.dtype == torch.float16
    assert torch.equal(y.detach().cpu(), wanted)
