"""The frozen prefix: the forward of the frozen layers, without a graph and as fast as its mode allows.

`Prefix` is used by FreezeOut. Routes, tried in this order: one chain of units (chain.py), a torch.fx split of the
model's own code (split.py), chains of what chains there are (each at least one unit).
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from ..attach import TransientHook
from .chain import Chain, Unit
from .cpu import Arena
from .folding import first_line, lower_chain, lower_graph
from .graph import Recorder, Segment
from .guard import HOOKED, STALE
from .runtime import (
    MODES,
    PROBE_SAMPLES,
    TOLERANCE,
    Originals,
    Refused,
    Runner,
    Trial,
    build_engine,
    constant,
    error_of,
    median,
    same_random_numbers,
)  # fmt: skip
from .split import Playback, Split, cut

__all__ = ["MODES", "Prefix", "PrefixReport"]

logger = logging.getLogger("freezeout_ext")

REPLICA = "replicas of nn.DataParallel run the frozen layers as they are"
SAME_MODULES = "exact would run the same modules on a CPU: they run as they are"


class LayerLike(Protocol):
    name: str
    modules: dict[str, nn.Module]


@dataclass(frozen=True)
class PrefixReport:
    """What runs the frozen prefix now; `str()` of it is for people.

    route: "chain", "split", "layers", "eager" (plain modules), "waiting" (for a forward in training mode) or "off".
    units: frozen modules that the route runs, of `of_units`.
    fused: how many operations of each fused kind. fallbacks: what did not go as the mode asks, and why.
    error: against eager on the probe, over eager's largest value. eager_ms, prefix_ms: medians of calls in turn,
    None where not timed (mode "exact" on the CPU runs the same modules); of a prefix that grew, eager_ms is the sum of
    what each part took when it was added. seconds: spent on the last capture.
    """

    mode: str
    route: str
    num_frozen: int
    units: int
    of_units: int
    fused: dict[str, int] = field(default_factory=dict)
    fallbacks: tuple[str, ...] = ()
    error: float | None = None
    eager_ms: float | None = None
    prefix_ms: float | None = None
    bytes_held: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [
            f"prefix: mode {self.mode}, route {self.route}, {self.num_frozen} layers frozen, "
            f"{self.units} of {self.of_units} modules in it, {self.bytes_held / 2**20:.1f} MiB held"
        ]
        if self.fused:
            lines.append("fused: " + ", ".join(f"{count} {kind}" for kind, count in sorted(self.fused.items())))
        if self.error is not None:
            lines.append(f"error against eager: {self.error:.1e} of its largest value")
        if self.eager_ms is not None:
            times = f"{self.prefix_ms:.2f} ms against {self.eager_ms:.2f} ms eager"
            lines.append(f"time: {times} ({self.prefix_ms / self.eager_ms:.2f})")
        lines += [f"- {fallback}" for fallback in self.fallbacks]
        return "\n".join(lines)


class Prefix:
    """frontier = frozen layers(inputs), under no_grad, at every call of the model from the freeze on.

    `freeze(n)` is cheap and cannot fail half-way: it takes down what cannot stay and notes n. The model's next
    forward in training mode runs as it is and is watched: that batch is the probe. At its end the prefix is captured,
    built, checked against what eager just gave, and installed (the torch.fx route watches one more forward). Then the
    engine and eager take turns for 2 * 3 calls of the same shape, timed; eager stays unless the engine's median is
    smaller. Nothing is run for the probe but frozen modules: buffers, hooks and random numbers of the active layers
    see what they would have seen.

    On the CPU a chain that runs is extended: it goes on running while the new layers alone are watched, and the longer
    engine is judged by eager's old time and theirs; only if it loses by that do the two take turns again.

    Args:
        layers: FreezeOut's layers: objects with `name` and `modules`, in forward order.
        mode: "exact" (the original modules, bit-equal), "folded" (BatchNorm folded, error about 1e-6), "bf16", "fp16"
            (the prefix computed in that dtype), "off". Under autocast the prefix follows its dtype.
        measure: False uses a checked engine without timing it, so that equal runs take equal paths. True installs
            nothing for "exact" on a CPU.

    Raises:
        ValueError: mode is none of these.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[LayerLike], *, mode: str = "exact", measure: bool = True
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"prefix must be one of {', '.join(MODES)}, got {mode!r}")
        self.model, self.layers, self.mode, self.measure = model, layers, mode, measure
        self.num_frozen = 0
        self._weights: dict = {}
        self._arena = Arena()
        self._graphs: dict = {}
        self._verified: set[nn.Module] = set()
        self._handles: list = []
        self._parts: list[Chain | Split] = []
        self._watcher: Recorder | Playback | None = None
        self._clear()

    def freeze(self, num_frozen: int) -> None:
        """The first `num_frozen` layers are frozen from now on: more than before, or fewer (thawed)."""
        if not 0 <= num_frozen <= len(self.layers):
            raise ValueError(f"num_frozen must be in 0..{len(self.layers)}, got {num_frozen}")
        if num_frozen < self.num_frozen:
            self._forget_weights()
        kept = self._extendable() if num_frozen > self.num_frozen else None
        self._stop_watching()
        if kept is None:
            self._take_down()
        self.num_frozen = num_frozen
        self._clear()
        if kept is not None:
            self._parts, self._kept = [kept], kept
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if num_frozen and self._gains_nothing():
            self._fallbacks.append(SAME_MODULES)
        elif num_frozen and self.mode != "off":
            self._pending = "chain"
            self._handles = [
                self.model.register_forward_pre_hook(TransientHook(self._before), with_kwargs=True),
                self.model.register_forward_hook(TransientHook(self._after), with_kwargs=True),
            ]

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to capture or to time; both read from the device, as no CUDA graph may."""
        return not self._pending and not any(part.runner.trial.open for part in self._parts)

    def close(self) -> None:
        """Frees everything and gives the modules their own forwards back."""
        self.freeze(0)

    def report(self) -> PrefixReport:
        """-> what runs now."""
        parts, units = self._parts, self._units()
        trials = [part.runner.trial for part in parts] + self._lost
        timed = [trial for trial in trials if trial.eager and trial.engine]
        fallbacks = list(self._fallbacks)
        fused: dict[str, int] = {}
        for part in parts:
            for kind, count in part.runner.engine.fused().items():
                fused[kind] = fused.get(kind, 0) + count
            fallbacks += part.runner.engine.fallbacks
            fallbacks += [f"{count} calls ran as they are: {reason}" for reason, count in part.bypassed.items()]
        buffers = {id(getattr(part.runner.engine, "arena", part)): part.runner.engine.bytes_held for part in parts}
        covered = {module for part in parts for module in part.guard.modules}
        return PrefixReport(
            mode=self.mode,
            route="off" if self.mode == "off" else "waiting" if self._pending else self._route,
            num_frozen=self.num_frozen,
            units=sum(unit.module in covered for unit in units),
            of_units=len(units),
            fused=fused,
            fallbacks=tuple(dict.fromkeys(fallbacks)),
            error=max(self._errors, default=None),
            eager_ms=sum(1e3 * median(trial.eager) for trial in timed) if timed else None,
            prefix_ms=sum(1e3 * median(trial.engine) for trial in timed) if timed else None,
            bytes_held=_nbytes(self._weights) + sum(buffers.values()),
            seconds=self._seconds,
        )

    # One watched forward

    def _before(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if model is not self.model:
            # A replica shares the hooks of its original, and runs in another thread.
            if REPLICA not in self._fallbacks:
                self._fallbacks.append(REPLICA)
            return
        if torch.compiler.is_compiling() or not model.training or not torch.is_grad_enabled():
            return
        self._stop_watching()
        looked_inside = {
            part.units[i].module for part in self._parts if isinstance(part, Chain) for i in part.looked_inside
        }
        if self._restart or looked_inside:
            cut_after = self._cut_after | looked_inside
            self._take_down()
            self._clear()
            self._cut_after, self._pending = cut_after, "chain"
        if self._pending == "split":
            try:
                self._watcher = Playback(self._cut, model, args, kwargs)
            except Refused as reason:
                self._refuse("split", reason)
                self._pending = "layers"
        if self._pending in ("chain", "layers"):
            kept = {unit.module for unit in self._kept.units} if self._kept else set()
            units = [unit for unit in self._units() if unit.module not in kept]
            self._watcher = Recorder(units, verified=self._verified, cut_after=self._cut_after, kept=self._kept)

    def _after(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self._watcher is None or model is not self.model:
            return
        start = time.perf_counter()
        stage, self._pending, watcher = self._pending, "", self._watcher
        try:
            if stage == "split":
                self._install_split(watcher, output)
            else:
                self._install_chains(stage, watcher, args, kwargs)
        except Exception as error:
            # A prefix is a saving; a run must not end for it. What it was is in the report.
            self._take_down()
            self._refuse("capture", error)
            logger.warning("prefix: the capture failed, the frozen layers run as they are: %s", first_line(error))
        finally:
            self._stop_watching()
            self._seconds += time.perf_counter() - start
        if not self._pending:
            logger.info("%s", self.report())

    def _stop_watching(self) -> None:
        if self._watcher is not None:
            self._watcher.remove()
        self._watcher = None

    def _install_chains(self, stage: str, recorder: Recorder, args: tuple, kwargs: dict) -> None:
        units, recording = self._units(), recorder.finish()
        whole = recording.single_chain(units)
        if self._kept is not None and not (whole and self._kept in self._parts):
            # It does not go on as one chain: all of it is seen in the next forward.
            self._take_down()
            self._kept, self._pending = None, "chain"
            return
        if stage == "chain" and not whole:
            try:
                self._cut = cut(self.model, args, kwargs)
                self._pending = "split"
                return
            except Refused as reason:
                self._refuse("split", reason)
        self._fallbacks += [f"{name} runs as it is: {reason}" for name, reason in recording.refused.items()]
        for segment in recording.segments:
            self._install_chain(segment)
        if self._parts:
            self._route = "chain" if whole and len(self._parts[0].units) == len(units) else "layers"

    def _install_chain(self, segment: Segment) -> None:
        kept, self._kept = self._kept, None
        start, x, y = segment.probe()
        rest = Chain(segment.units[start:], x, segment.autocast) if start < len(segment.units) else None
        if kept is None:
            few = segment.few
            chain = Chain(segment.units, segment.x, segment.autocast)
        else:
            chain = Chain(segment.units, kept.few[0], segment.autocast)
            with _quietly(x.device, segment.autocast):
                few = (kept.few[0], Chain(segment.units[segment.kept :], x, segment.autocast).originals(kept.few[1])[0])
        # Other batch sizes may run other kernels: exact is judged on the whole batch.
        few_x, few_y = (x, y) if self.mode == "exact" and start == 0 and x.device.type != "cpu" else few

        def check_originals() -> float:
            if rest is None:
                return 0.0
            n = PROBE_SAMPLES
            return error_of(rest.originals(x[:n]), (y[:n],)) and error_of(rest.originals(x), (y,))

        trial = kept.runner.trial.extended(segment.seconds) if kept else Trial()
        try:
            if kept is not None:
                kept.remove()
                if self.mode != "exact":  # which checks nothing else
                    self._check_again(rest, x, y, segment.autocast)
            runner = self._runner(
                chain.originals,
                lambda: lower_chain([unit.module for unit in segment.units], self._graphs),
                (few_x,), (few_y,), segment.autocast, check_originals, trial,
            )  # fmt: skip
        except Refused as reason:
            if kept is not None:
                kept.install(kept.runner)
            return self._refuse(chain.name, reason)
        if isinstance(runner.engine, Originals) and x.device.type == "cpu":
            self._verified.update(unit.module for unit in segment.units)
        if kept is not None:
            self._parts.remove(kept)
        chain.few = few
        self._install(chain, runner)

    def _check_again(self, rest: Chain, x: torch.Tensor, y: torch.Tensor, autocast: tuple) -> None:
        """What was watched against the same modules once more: a kept chain's own probe has other samples."""
        with _quietly(x.device, autocast):
            found = error_of(rest.originals(x[:PROBE_SAMPLES]), (y[:PROBE_SAMPLES],))
        if not found <= TOLERANCE["bf16" if autocast[0] else "folded"]:
            raise Refused(f"{rest.name} gave something else in the watched forward")

    def _install_split(self, playback: Playback, output: Any) -> None:
        try:
            frontier = playback.check(output)
            split = Split(self.model, self._cut, playback.autocast)
            runner = self._runner(
                split.originals, lambda: lower_graph(self._cut.prefix), tuple(playback.inputs), frontier,
                playback.autocast, lambda: 0.0, Trial(),
            )  # fmt: skip
        except Refused as reason:
            self._refuse("split", reason)
            self._pending = "layers"
            return
        self._install(split, runner)
        self._route = "split"

    def _runner(self, originals, lower, inputs, expected, autocast, check_originals, trial) -> Runner:
        """The engine of the mode, or the originals where it is refused, checked against eager."""
        device = next(x.device for x in tree_flatten(inputs)[0] if isinstance(x, torch.Tensor))
        half = autocast[1] if autocast[0] else None
        trial = trial if self.measure else None
        with _quietly(device, autocast):
            try:
                engine = build_engine(self.mode, originals, lower, expected, device, self._weights, self._arena, half)
                if not isinstance(engine, Originals):
                    mode = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(half, self.mode)
                    tolerance = TOLERANCE["exact" if self.mode == "exact" else mode]
                    tolerance = max(tolerance, getattr(engine, "tolerance", 0.0))  # TF32 has its own
                    self._check(lambda: error_of(engine(*inputs), expected), tolerance)
                    return Runner(engine, originals, trial=trial)
            except Refused as reason:
                self._refuse(self.mode, reason)
                engine = Originals(originals)
            self._check(check_originals, 0.0)
        return Runner(engine, originals, trial=trial)

    def _check(self, error: Any, tolerance: float) -> None:
        try:
            found = error()
        except Exception as failure:  # whatever a module raises on the probe, eager did not
            raise Refused(f"fails on the probe: {first_line(failure)}") from failure
        if not found <= tolerance:
            raise Refused(f"error {found:.1e} against eager, allowed {tolerance:.0e}")
        self._errors.append(found)

    def _install(self, part: Chain | Split, runner: Runner) -> None:
        runner.on_loss = lambda: self._lose(part)
        part.on_bypass = self._bypassed
        part.install(runner)
        self._parts.append(part)

    def _bypassed(self, reason: str) -> None:
        if reason in (STALE, HOOKED):
            self._restart = True
        if reason == STALE:
            self._forget_weights()

    def _lose(self, part: Chain | Split) -> None:
        part.remove()
        self._parts.remove(part)
        trial = part.runner.trial
        self._lost.append(trial)
        self._refuse(
            "engine", f"eager is as fast: {1e3 * median(trial.eager):.2f} ms, {1e3 * median(trial.engine):.2f} ms"
        )
        if not self._parts:
            self._route = "eager"

    def _refuse(self, what: str, reason: Any) -> None:
        self._fallbacks.append(
            f"{what} not used: {reason if isinstance(reason, str | Refused) else first_line(reason)}"
        )

    def _gains_nothing(self) -> bool:
        """Whether eager wins without a trial: mode "exact" saves launches, of which a CPU has none."""
        return self.mode == "exact" and self.measure and all(p.device.type == "cpu" for p in self.model.parameters())

    def _extendable(self) -> Chain | None:
        """The one chain of all that was frozen so far: it may go on running while what comes behind it is watched."""
        if self._kept is not None:
            return self._kept if self._kept in self._parts and not self._restart else None
        whole = self._route == "chain" and not self._pending and not self._restart and len(self._parts) == 1
        chain = self._parts[0] if whole else None
        # On a GPU eager takes a few milliseconds, which is what its trials cost.
        return chain if whole and not chain.looked_inside and chain.few[0].device.type == "cpu" else None

    def _units(self) -> list[Unit]:
        found: dict[nn.Module, Unit] = {}
        for layer in self.layers[: self.num_frozen]:
            for name, module in layer.modules.items():
                found.setdefault(module, Unit(name, module))
        return list(found.values())

    def _take_down(self) -> None:
        self._stop_watching()  # it stands on what the parts installed
        for part in self._parts:
            part.remove()
        self._parts = []

    def _forget_weights(self) -> None:
        self._weights.clear()
        self._arena = Arena()
        self._graphs.clear()
        self._verified.clear()

    def _clear(self) -> None:
        self._pending, self._route = "", "eager"
        self._restart = False
        self._parts: list[Chain | Split] = []
        self._kept: Chain | None = None
        self._watcher: Recorder | Playback | None = None
        self._cut: Any = None
        self._cut_after: set[nn.Module] = set()
        self._fallbacks: list[str] = []
        self._errors: list[float] = []
        self._lost: list = []
        self._seconds = 0.0


@contextmanager
def _quietly(device: torch.device, autocast: tuple) -> Iterator[None]:
    """For a probe: no graph, the user's autocast, no random number of his used."""
    with same_random_numbers(device), constant(), torch.autocast(device.type, enabled=autocast[0], dtype=autocast[1]):
        yield


def _nbytes(weights: dict) -> int:
    tensors = {id(t): t for pair in weights.values() for t in pair if isinstance(t, torch.Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())
