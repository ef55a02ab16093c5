"""What runs the frozen prefix now, for people."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PrefixReport:
    """What runs the frozen prefix now, for people by `str()`.

    Attributes:
        route: "chain" (all frozen modules as one), "split" (in several chains, the model's own code between them),
            "eager" (the modules as they are), "waiting" (for a forward in training mode) or "off".
        units: frozen modules that the route runs, of `of_units`.
        fused: how many operations of each fused kind.
        fallbacks: what did not go as the mode asks, and why.
        error: against eager on the probe, over eager's largest value.
        eager_ms, prefix_ms: medians of calls in turn, None where nothing was timed.
        bytes_held: packed weights, kept values that the guard compares, buffers, graphs.
        seconds: spent on the last capture.
        calls: how often the engines ran since the last capture.
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
    calls: int = 0

    def __str__(self) -> str:
        lines = [
            f"prefix: mode {self.mode}, route {self.route}, {self.num_frozen} layers frozen, "
            f"{self.units} of {self.of_units} modules in it, {self.bytes_held / 2**20:.1f} MiB held"
        ]
        if self.fused:
            lines.append("fused: " + ", ".join(f"{count} {kind}" for kind, count in sorted(self.fused.items())))
        if self.error is not None:
            lines.append(f"error against eager: {self.error:.1e} of its largest value")
        if self.eager_ms is not None and self.prefix_ms is not None:
            times = f"{self.prefix_ms:.2f} ms against {self.eager_ms:.2f} ms eager"
            lines.append(f"time: {times} ({self.prefix_ms / self.eager_ms:.2f})")
        lines += [f"- {fallback}" for fallback in self.fallbacks]
        return "\n".join(lines)
