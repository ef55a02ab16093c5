"""measure_costs: forward and backward of every layer, timed inside whole training steps on the model's device."""

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..arguments import check_callable, check_count, check_kind
from ..batch import Batch, size
from ..layers import Layers
from .costs import StepCosts
from .layer_bench import LayerBench, MakeOptimizer

LOADER_BATCHES = 20


def measure_costs(
    model: nn.Module,
    example_inputs: Batch,
    targets: Batch,
    criterion: Callable[..., Tensor],
    *,
    layers: Layers | None = None,
    make_optimizer: MakeOptimizer | None = None,
    amp_dtype: torch.dtype | None = None,
    rounds: int = 3,
    max_seconds: float = 60.0,
    loader: float = 0.0,
    loader_ahead: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> StepCosts:
    """StepCosts in seconds: medians over `rounds` rounds. In each round every layer is the first active one once.

    Each step is a whole training step, so caches, allocator and kernel choice are those of training.
    The layers in front of the first active one are in eval mode and need no gradient.
    No FreezeOut runs: its saving is computed from the layers' times, not measured.
    Steps without instruments, in turn with the others, give `whole_step`.
    Each round has its own copy of the model, since a net's place in memory decides some percent of its time.
    The learning rates are 0. The model, its gradients and torch's generators stay as they are.

    On a CPU with one thread the clock is that thread's CPU time, which stands still while other programs have the core.

    Args:
        example_inputs: the inputs of one batch of the size to train with. For inputs that are no tensor see
            `batch.call`.
        targets: the targets of that batch.
        criterion: (outputs, targets) -> scalar loss.
        layers: of `model`, as find_layers gives them.
        make_optimizer: param groups -> optimizer. Default: FusedSGD with Nesterov momentum.
        amp_dtype: autocast's dtype; None: no autocast.
        rounds: how many rounds are measured.
        max_seconds: no further round begins after so many seconds. The first round is always whole.
        loader: seconds to fetch one batch, see `measure_loader`.
        loader_ahead: whether the loader works while the step runs.
        on_progress: called with (layers done, layers of all rounds) before each layer.
    """
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    check_callable("criterion", criterion, "(outputs, targets)")
    check_kind("layers", layers, Layers, "what find_layers gives", optional=True)
    if make_optimizer is not None:
        check_callable("make_optimizer", make_optimizer, "param groups")
    check_kind("amp_dtype", amp_dtype, torch.dtype, "a torch.dtype", optional=True)
    check_count("rounds", rounds, 1)
    check_kind("max_seconds", max_seconds, int | float, "a number")
    if not max_seconds >= 0:
        raise ValueError(f"max_seconds must be >= 0, got {max_seconds}")
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        bench = LayerBench(
            model,
            example_inputs,
            targets,
            criterion,
            layers=layers,
            make_optimizer=make_optimizer,
            amp_dtype=amp_dtype,
        )
        if device.type == "cuda":
            for k in range(len(bench.layers)):  # cuDNN tries its algorithms
                bench.step(k)
        bench.forget()
        begin = time.perf_counter()
        while len(bench.rounds) < rounds and (not bench.rounds or time.perf_counter() - begin < max_seconds):
            bench.round(lambda done: on_progress(done, rounds * len(bench.layers)))
        memory = bench.memory()
    what = f"medians of {len(bench.rounds)} round{'s' * (len(bench.rounds) != 1)}"
    clock = " of CPU time" if device.type == "cpu" and bench.clock == time.thread_time else ""
    source = f"measured on {_device_name(device)}, batch {size(example_inputs)}, {what}{clock}"
    return bench.costs(loader=loader, loader_ahead=loader_ahead, memory=memory, source=source)


def measure_loader(
    loader: Iterable,
    *,
    batches: int = LOADER_BATCHES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, bool]:
    """(seconds a batch while nothing else runs, whether the loader works ahead while a step runs).

    The first batch is not counted. A loader works ahead where it has workers, as torch's DataLoader may have.

    Args:
        batches: the most batches that are counted.
        on_progress: called with (batches counted, batches) at each batch.

    Raises:
        ValueError: the loader gives fewer than two batches.
    """
    iterator = iter(loader)
    count = -1
    start = time.perf_counter()
    for count, _ in enumerate(iterator):
        if count == 0:
            start = time.perf_counter()
        on_progress(count, batches)
        if count == batches:
            break
    if count < 1:
        raise ValueError(f"loader must give at least 2 batches, got {count + 1}")
    return (time.perf_counter() - start) / count, getattr(loader, "num_workers", 0) > 0


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} with {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}"
