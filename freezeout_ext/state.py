"""A state of FreezeOut: what follows from it, what is saved, and all that is checked of it before anything changes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from .arguments import check_kind
from .layers import Layers
from .schedule import Schedule
from .transition import Transition


def due(schedule: Schedule, step: int, by_hand: tuple[int, int] | None) -> int:
    """How many layers are frozen at `step`: the rule's number, or that of a move by hand until the next milestone.

    Args:
        by_hand: the step of the last move by hand, and the number of frozen layers that it left.
    """
    rule = schedule.num_frozen(step)
    if by_hand is None:
        return rule
    since, moved_to = by_hand
    return moved_to if rule == schedule.num_frozen(since) else max(moved_to, rule)


def state_of(
    step: int,
    by_hand: tuple[int, int] | None,
    schedule: Schedule,
    layers: Layers,
    transitions: Sequence[Transition],
) -> dict[str, Any]:
    """What FreezeOut.state_dict() returns; plain containers."""
    return {
        # A run that goes on beyond the end stays at the end.
        "step": min(step, schedule.total_steps),
        "by_hand": by_hand,
        "schedule": asdict(schedule),
        "layers": [layer.name for layer in layers],
        # A tuple: torch.distributed.checkpoint takes a list of dicts apart and then wants as many to load into.
        "transitions": tuple(asdict(transition) for transition in transitions),
    }


def checked_state(
    state_dict: Mapping[str, Any], schedule: Schedule, layers: Layers
) -> tuple[int, tuple[int, int] | None, list[Transition]]:
    """A state of FreezeOut -> (step, last move by hand, transitions). Changes nothing.

    Raises:
        ValueError, TypeError: what is wrong with it, by key.
    """
    check_kind("state_dict", state_dict, Mapping, "a dict")
    missing = [key for key in ("step", "schedule", "layers", "transitions") if key not in state_dict]
    if missing:
        raise ValueError(f"state_dict must be of FreezeOut.state_dict(), {', '.join(missing)} is missing")
    found, expected = state_dict["schedule"], asdict(schedule)
    check_kind("state_dict['schedule']", found, Mapping, "a dict")
    defaults = {f.name: f.default for f in fields(Schedule)}  # states of earlier releases lack the newer ones
    for name, mine in expected.items():
        theirs = found.get(name, defaults[name])
        if (tuple(theirs) if isinstance(theirs, list) else theirs) != mine:
            raise ValueError(
                f"state_dict must be of the same schedule, {name} is {found.get(name)!r} there, {mine!r} here"
            )
    names = [layer.name for layer in layers]
    if not isinstance(state_dict["layers"], list | tuple) or list(state_dict["layers"]) != names:
        raise ValueError(f"state_dict must be of the same layers, got {state_dict['layers']}, here {names}")
    step = _number("step", state_dict["step"], schedule.total_steps)
    by_hand = state_dict.get("by_hand")
    if by_hand is not None:
        if not isinstance(by_hand, list | tuple) or len(by_hand) != 2:
            raise ValueError(f"state_dict['by_hand'] must be None or (step, number of layers), got {by_hand!r}")
        by_hand = _number("by_hand", by_hand[0], step), _number("by_hand", by_hand[1], len(layers) - 1)
    return step, by_hand, _transitions(state_dict["transitions"], len(layers))


def _transitions(transitions: Sequence[Any], num_layers: int) -> list[Transition]:
    check_kind("state_dict['transitions']", transitions, list | tuple, "a list")
    kinds: dict[str, type | tuple[type, ...]] = {
        "step": int,
        "num_frozen": int,
        "parameters_frozen": int,
        "state_bytes_freed": int,
        "seconds": (int, float),
    }
    checked = []
    for i, found in enumerate(transitions):
        where = f"state_dict['transitions'][{i}]"
        check_kind(where, found, Mapping, "a dict")
        known = {f.name for f in fields(Transition)}
        if not {*kinds, "layers"} <= set(found) <= known:
            raise ValueError(f"{where} must have the entries {', '.join(sorted(known))}, got {sorted(map(str, found))}")
        wrong = [name for name, kind in kinds.items() if not isinstance(found[name], kind)]
        if wrong or not isinstance(found["layers"], list | tuple):
            raise ValueError(f"{where} must be an entry of FreezeOut.state_dict(), got {dict(found)}")
        _number(f"transitions'][{i}]['num_frozen", found["num_frozen"], num_layers - 1)
        checked.append(Transition(**{**found, "layers": tuple(found["layers"])}))
    return checked


def _number(key: str, value: object, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"state_dict['{key}'] must be a whole number in 0..{most}, got {value!r}")
    return value
