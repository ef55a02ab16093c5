"""The life of a frozen prefix: watched, captured, installed, watched again where something changed."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from ..attach import OwnForward, TransientHook
from .build import MODES, Builder
from .chain import Chain
from .code import asks_identity
from .guard import HOOKED, STALE, changes_of
from .judge import Refused, Trial, first_line, median, shapes_of, signals_held
from .report import PrefixReport
from .units import name_of, run_units
from .watch import Recorder, Segment

logger = logging.getLogger("freezeout_ext")

SAME_MODULES = "exact would run the same modules on a CPU: they run as they are"
NOT_CALLED = "frozen layers are called, but the model itself is not: its own forward is what is watched"
FICKLE = "its state changes from forward to forward"


class LayerLike(Protocol):
    name: str
    modules: dict[str, nn.Module]


class Prefix:
    """frontier = frozen layers(inputs), under no_grad, at every call of the model from the freeze on.

    `freeze(n)` is cheap and cannot fail half-way. It takes all engines down. The model's next forward in training mode
    is watched: that batch is the probe. At its end the prefix is captured, checked on a few samples against the
    modules, and installed. The next forward shows whether anyone looks at a value inside a chain. The chain is then cut
    there. The engine and eager take turns, timed, on up to 6 calls of the same shape, the watched one among them. Eager
    stays unless the engine's median is smaller.

    A module is part of the prefix only if all that its forward can read is under guard. The others run as they are, and
    the report says why. Once anything of a guarded module changes, by `p.data.copy_()` too, the modules run as they are
    from that call on, and the next forward is watched again.

    Args:
        layers: FreezeOut's layers: objects with `name` and `modules`, in forward order.
        mode: "exact" (the original modules, bit-equal), "folded" (BatchNorm folded, error about 1e-6), "bf16", "fp16"
            (the prefix computed in that dtype), "off". Under autocast the prefix follows autocast's dtype.
        measure: False uses a checked engine without timing the engine, so that equal runs take equal paths. True
            installs nothing for "exact" on a CPU.

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
        self._handles: list = []
        self._chains: list[Chain] = []
        self._recorder: Recorder | None = None
        self._sentinel: OwnForward | None = None
        self._paused = 0
        self._inside = False  # the model's own forward
        self._begin(waits=False)

    def freeze(self, num_frozen: int) -> None:
        """The first `num_frozen` layers are frozen from now on: more than before, or fewer (thawed).

        Raises:
            ValueError: there are not so many layers.
        """
        if not 0 <= num_frozen <= len(self.layers):
            raise ValueError(f"num_frozen must be in 0..{len(self.layers)}, got {num_frozen}")
        self._take_down()
        for handle in self._handles:
            handle.remove()
        self.num_frozen, self._handles = num_frozen, []
        same = self._gains_nothing()
        waits = num_frozen > 0 and self.mode != "off" and not same
        self._begin(waits)
        if num_frozen and same:
            self._fallbacks.append(SAME_MODULES)
        if waits:
            self._handles = [
                self.model.register_forward_pre_hook(TransientHook(self._before), with_kwargs=True),
                self.model.register_forward_hook(TransientHook(self._after), with_kwargs=True),
            ]
            first = next(iter(self._names()))
            self._sentinel = OwnForward(first, self._called_alone) if first is not self.model else None

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to capture, to cut or to time. All of these read from the device, as no graph may."""
        return not self._waits and all(chain.is_settled for chain in self._chains)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block nothing is watched, timed or noted. Engines go on running."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    changes = staticmethod(changes_of)

    def close(self) -> None:
        """Frees everything and gives the modules their own forwards back."""
        self.freeze(0)

    def report(self) -> PrefixReport:
        """-> what runs now."""
        chains, names = self._chains, self._names()
        engines = [chain.trial.engine for chain in chains]
        units = [unit for chain in chains for unit in chain.units]
        timed = [chain.trial for chain in chains if chain.trial.eager and chain.trial.timed]
        fallbacks = list(self._fallbacks)
        for engine, chain in zip(engines, chains, strict=True):
            fallbacks += engine.fallbacks
            fallbacks += [f"{count} calls ran as they are: {reason}" for reason, count in chain.bypassed.items()]
        whole = len(chains) == 1 and len(units) == len(names)
        route = "waiting" if self._waits else "chain" if whole else "split" if chains else "eager"
        return PrefixReport(
            mode=self.mode,
            route="off" if self.mode == "off" else route,
            num_frozen=self.num_frozen,
            units=len(units),
            of_units=len(names),
            fused=dict(sum((Counter(engine.fused()) for engine in engines), Counter[str]())),
            fallbacks=tuple(dict.fromkeys(fallbacks)),
            error=max((chain.error for chain in chains), default=None),
            eager_ms=sum(1e3 * median(trial.eager) for trial in timed) if timed else None,
            prefix_ms=sum(1e3 * median(trial.timed) for trial in timed) if timed else None,
            bytes_held=sum(each.bytes_held for each in [*engines, *(unit.guard for unit in units)]),
            seconds=self._seconds,
            calls=sum(chain.trial.calls for chain in chains),
        )

    # One watched forward

    def _called_alone(self, *args: Any, **kwargs: Any) -> Any:
        if not self._inside and NOT_CALLED not in self._fallbacks:
            self._fallbacks.append(NOT_CALLED)
        assert self._sentinel is not None  # whose function this is
        return self._sentinel.original(*args, **kwargs)

    def _before(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if model is not self.model or self._paused or torch.compiler.is_compiling():
            return
        self._inside = True
        self._stop_watching()  # a forward that ended in an exception
        if not model.training or not torch.is_grad_enabled():
            return
        changed = self._changed()
        if self._waits or changed:
            self._take_down()
            with signals_held():
                names = self._names()
                cut_after = self._cut_after | {m for m, name in names.items() if asks_identity(self.model, name)}
                self._recorder = Recorder(names, cut_after=cut_after, refused=self._left_out)

    def _changed(self) -> bool:
        """Whether the chains have to be captured anew. Where to cut them, and what to leave out, is noted."""
        cut = {chain.units[i].module for chain in self._chains for i in chain.looked_inside}
        self._cut_after |= cut
        suspects = [unit for chain in self._chains if chain.was_changed for unit in chain.units]
        broken = [unit.module for unit in suspects if unit.guard.broken() in (STALE, HOOKED)]
        for chain in self._chains:
            chain.was_changed = False
        self._strikes.update(broken)
        self._left_out |= {module: FICKLE for module, count in self._strikes.items() if count > 2}
        return bool(cut or broken)

    def _after(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if model is not self.model:
            return
        for chain in list(self._chains):
            chain.settle()
            if chain.trial.eager_wins():
                self._lose(chain)
        if self._paused:
            return
        self._inside = False
        if self._recorder is None:
            return
        start = time.perf_counter()
        with signals_held():
            try:
                self._capture()
            except Exception as error:
                # A prefix is a saving; a run must not end for it. What it was is in the report.
                self._take_down()
                self._waits = False
                self._refuse("capture", error)
                logger.warning("prefix: the capture failed, the frozen layers run as they are: %s", first_line(error))
            finally:
                self._stop_watching()
                self._seconds += time.perf_counter() - start
        if not self._waits:
            logger.info("%s", self.report())

    def _capture(self) -> None:
        assert self._recorder is not None  # the forward was watched
        seen = self._recorder
        seen.finish()
        self._begin(waits=bool(seen.left_out or seen.written), anew=False)
        self._left_out.update(seen.left_out)
        self._cut_after.update(seen.written)
        if self._waits:
            return  # to watch the next forward
        self._fallbacks += [f"{name} runs as it is: {reason}" for name, reason in seen.refused.items()]
        for segment in seen.segments:
            self._install(segment)

    def _install(self, segment: Segment) -> None:
        units = segment.units
        try:
            engine, error = Builder(self.mode, segment).build()
        except Refused as reason:
            return self._refuse(name_of(units), reason)
        shapes, originals = shapes_of(segment.inputs), partial(run_units, units)
        trial = Trial(engine, originals, shapes, watched=segment.seconds, open=self.measure)
        self._chains.append(Chain(units, segment.inputs, segment.autocast, trial, error))

    def _lose(self, chain: Chain) -> None:
        chain.remove()
        self._chains.remove(chain)
        times = " ms, ".join(f"{1e3 * median(times):.2f}" for times in (chain.trial.eager, chain.trial.timed))
        self._refuse(name_of(chain.units), f"eager is as fast: {times} ms")

    def _refuse(self, what: str, reason: Any) -> None:
        text = str(reason) if isinstance(reason, str | Refused) else first_line(reason)
        self._fallbacks.append(f"{what} not used: {text}")

    def _gains_nothing(self) -> bool:
        """Whether eager wins without a trial. Mode "exact" saves launches, and a CPU has none."""
        if self.mode != "exact" or not self.measure:
            return False
        return all(p.is_cpu for module in self._names() for p in module.parameters())

    def _names(self) -> dict[nn.Module, str]:
        """-> the frozen modules and their names. A module that is in two layers has the first one's."""
        found: dict[nn.Module, str] = {}
        for layer in self.layers[: self.num_frozen]:
            for name, module in layer.modules.items():
                found.setdefault(module, name)
        return found

    def _stop_watching(self) -> None:
        if self._recorder is not None:
            self._recorder.remove()
        self._recorder = None

    def _take_down(self) -> None:
        # What was put on the modules last goes first.
        self._stop_watching()
        if self._sentinel is not None:
            self._sentinel.remove()
        self._sentinel = None
        for chain in self._chains:
            chain.remove()
        self._chains = []

    def _begin(self, waits: bool, *, anew: bool = True) -> None:
        """Nothing is noted so far. `anew`: nothing is known of the modules either."""
        self._waits = waits
        self._fallbacks: list[str] = []
        if anew:
            self._seconds: float = 0.0
            self._cut_after: set[nn.Module] = set()
            self._left_out: dict[nn.Module, str] = {}
            self._strikes: Counter[nn.Module] = Counter()
