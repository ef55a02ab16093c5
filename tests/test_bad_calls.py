"""Each argument of the public API with values of the wrong kind: an error that names it, and nothing was done."""

import inspect
import itertools
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_cases import Pictures
from torch import nn
from torch.nn import functional

import freezeout_ext
from freezeout_ext import (
    FeatureCache,
    FreezeOut,
    FusedAdam,
    FusedAdamW,
    FusedSGD,
    GraphedStep,
    Layers,
    Schedule,
    find_layers,
    planner,
    training,
)
from freezeout_ext.integrations.compile import CompiledLayers
from freezeout_ext.integrations.distributed import DDPFollower
from freezeout_ext.tasks import Task
from freezeout_ext.training.config import BadInput, TrainConfig
from freezeout_ext.training.reporters import Reporter


def closed_file() -> Any:
    file = tempfile.TemporaryFile()  # noqa: SIM115
    file.close()
    return file


KINDS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "str": lambda: "no such thing",
    "bytes": lambda: b"0.5",
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "half": lambda: 0.5,
    "-1": lambda: -1,
    "0": lambda: 0,
    "huge": lambda: 10**30,
    "True": lambda: True,
    "list": lambda: [],
    "list of objects": lambda: [object()],
    "dict": lambda: {},
    "generator": lambda: (i for i in range(3)),
    "tensor": lambda: torch.full((3,), 0.5),
    "module": lambda: nn.Linear(5, 7),
    "closed file": closed_file,
    "class": lambda: Pictures,
    "object": object,
}


@dataclass
class Case:
    """A call that is right, and what it may change."""

    function: Callable
    given: dict[str, Any]
    model: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    watched: Any = None  # compared by repr

    def state(self) -> Any:
        """What a call that raises leaves as it was."""
        found: list[Any] = [repr(self.watched)]
        for module in self.model.modules() if self.model else ():
            hooks = [len(v) for k, v in sorted(vars(module).items()) if k.endswith("_hooks")]
            own = sorted(k for k in vars(module) if k in ("train", "forward", "_call_impl", "_compiled_call_impl"))
            found.append((hooks, own, module.training, [p.requires_grad for p in module.parameters(recurse=False)]))
        if self.optimizer is not None:
            hooks = [len(v) for k, v in sorted(vars(self.optimizer).items()) if k.endswith("_hooks")]
            groups = [
                {k: v for k, v in g.items() if k != "params"} | {"params": [id(p) for p in g["params"]]}
                for g in self.optimizer.param_groups
            ]
            found.append((hooks, groups, sorted(map(str, self.optimizer.state))))
        return found


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)), nn.Linear(4, 3))


def trained(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer, FreezeOut]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    freezeout = FreezeOut(model, optimizer, total_steps=8, measure_prefix=False, **options)
    return model, optimizer, freezeout


def method(name: str, **given: Any) -> Callable[[], Case]:
    def make() -> Case:
        model, optimizer, freezeout = trained()
        return Case(getattr(freezeout, name), given, model, optimizer, freezeout.state_dict())

    return make


def freeze_out() -> Case:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Case(FreezeOut, {"model": model, "optimizer": optimizer, "total_steps": 8}, model, optimizer)


def load_state() -> Case:
    model, optimizer, freezeout = trained()
    given = {"state_dict": freezeout.state_dict()}
    return Case(freezeout.load_state_dict, given, model, optimizer, freezeout.state_dict())


def graphed_step() -> Case:
    model, optimizer, freezeout = trained(anneal=False)
    given = {"model": model, "criterion": functional.cross_entropy, "optimizer": optimizer, "freezeout": freezeout}
    return Case(GraphedStep, given, model, optimizer, freezeout.state_dict())


def graphed_call() -> Case:
    model, optimizer, freezeout = trained()
    step = GraphedStep(model, functional.cross_entropy, optimizer, freezeout)
    given = {"inputs": torch.randn(2, 4), "targets": torch.tensor([0, 1])}
    return Case(step, given, model, optimizer, freezeout.state_dict())


def set_step_count() -> Case:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = GraphedStep(model, functional.cross_entropy, optimizer)
    return Case(lambda step_count: setattr(step, "step_count", step_count), {"step_count": 3}, model, optimizer)


def feature_cache() -> Case:
    return Case(FeatureCache, {"dataset": Pictures()})


def cached(name: str, **given: Any) -> Callable[[], Case]:
    def make() -> Case:
        cache = FeatureCache(Pictures())
        model, optimizer, _ = trained(cache=cache)
        return Case(getattr(cache, name), given, model, optimizer, cache.report())

    return make


def samples() -> Case:
    case = cached("samples", keys=[0, 1])()
    run = case.function

    def enter(keys: Any, *, lengths: Any = None) -> None:
        with run(keys, lengths=lengths):
            case.model(torch.randn(2, 4))

    case.function = enter
    return case


def layer_list() -> Case:
    return Case(Layers, {"layers": list(find_layers(net()))})


def found_layers() -> Case:
    model = net()
    return Case(find_layers, {"model": model}, model)


def device_schedule() -> Case:
    model = net()
    optimizer = FusedSGD(model.parameters(), lr=0.1)
    given = {"step": torch.tensor(0), "rates": [(0.1, 8, 0)]}
    return Case(optimizer.set_device_schedule, given, model, optimizer, optimizer._device_schedule)


def compiled_layers() -> Case:
    model, optimizer, freezeout = trained()
    return Case(CompiledLayers, {"freezeout": freezeout, "backend": "eager"}, model, optimizer)


def ddp_follower() -> Case:
    model, optimizer, freezeout = trained()
    return Case(DDPFollower, {"freezeout": freezeout}, model, optimizer)


def planned() -> Case:
    model = net()
    given = {
        "model": model, "example_inputs": torch.randn(2, 4), "targets": torch.tensor([0, 1]),
        "criterion": functional.cross_entropy, "total_steps": 8, "rounds": 1, "t_0s": (0.5,), "max_seconds": 0.1,
    }  # fmt: skip
    return Case(planner.plan, given, model)


class Here:
    """What lies in the folder that tests run in."""

    def __repr__(self) -> str:
        return str(sorted(map(str, Path.cwd().rglob("*"))))


TINY = {"epochs": 1, "batch_size": 4, "device": "cpu", "threads": 1, "t_0": 0.5}
folders = (f"run-{i}" for i in itertools.count())


def tiny_task() -> Task:
    samples = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.arange(8) % 3)
    return Task(make_model=net, train=samples, evaluation=samples)


def train_config() -> Case:
    def resolved(**given: Any) -> TrainConfig:
        return TrainConfig(**given).resolved()

    resolved.__signature__ = inspect.signature(TrainConfig)  # type: ignore[attr-defined]
    return Case(resolved, {})


def in_training(function: Callable, **given: Any) -> Callable[[], Case]:
    def make() -> Case:
        out = {} if function is training.plan else {"out": next(folders)}
        return Case(function, {"task": tiny_task(), **TINY, **out, **given}, watched=Here())

    return make


def schedule(name: str, **given: Any) -> Callable[[], Case]:
    return lambda: Case(getattr(Schedule(4, 8), name), given)


def layers(name: str, **given: Any) -> Callable[[], Case]:
    return lambda: Case(getattr(find_layers(net()), name), given)


CALLS: dict[str, Callable[[], Case]] = {
    "FreezeOut": freeze_out,
    "FreezeOut.freeze_to": method("freeze_to", num_frozen=1),
    "FreezeOut.thaw_to": method("thaw_to", num_frozen=0),
    "FreezeOut.register_transition_hook": method("register_transition_hook", hook=print),
    "FreezeOut.load_state_dict": load_state,
    "FreezeOut.anneals_as": method("anneals_as", i=1),
    "GraphedStep": graphed_step,
    "GraphedStep.step_count": set_step_count,
    "GraphedStep()": graphed_call,
    "FeatureCache": feature_cache,
    "FeatureCache.loader": cached("loader", batch_size=4),
    "FeatureCache.samples": samples,
    "FeatureCache.load_state_dict": cached("load_state_dict", state_dict={"samples": 32, "views": 4, "seed": 0}),
    "Schedule": lambda: Case(Schedule, {"num_layers": 4, "total_steps": 8}),
    "Schedule.t": schedule("t", i=1),
    "Schedule.milestone": schedule("milestone", i=1),
    "Schedule.lr_factor": schedule("lr_factor", i=1, step=2),
    "Schedule.num_frozen": schedule("num_frozen", step=2),
    "Schedule.next_milestone": schedule("next_milestone", step=2),
    "Layers": layer_list,
    "Layers.count_through": layers("count_through", last=1, argument="last"),
    "find_layers": found_layers,
    "FusedSGD.set_device_schedule": device_schedule,
    "CompiledLayers": compiled_layers,
    "DDPFollower": ddp_follower,
    "plan": planned,
    "TrainConfig": train_config,
    "training.train": in_training(training.train, reporter=Reporter()),
    "training.plan": in_training(training.plan, rounds=1, max_seconds=0.0, t_0s=(0.5,), how_scales=("linear",)),
    "training.compare": in_training(training.compare, seeds=1, kinds=("full",)),
}

# What is no fault: the reason, the kinds, the places.
FINE: list[tuple[str, tuple[str, ...], dict[str, str]]] = [
    ("a flag", ("True",), {
        "FreezeOut": "anneal scale_lr measure_prefix", "GraphedStep": "graph", "Schedule": "scale_lr",
        "FeatureCache": "measure loader.shuffle loader.drop_last", "training": "train.resume compare.resume",
        "TrainConfig": " ".join(field.name for field in fields(TrainConfig) if "bool" in str(field.type)),
    }),
    ("the default", ("None",), {
        "FreezeOut": "layers milestones max_transitions cache scale_lr", "Schedule": "max_transitions milestones",
        "GraphedStep": "freezeout cosine scaler amp_dtype", "find_layers": "layers", "DDPFollower": "ddp",
        "FeatureCache": "dtype limit loader.collate_fn loader.seed loader.rank loader.world_size samples.lengths",
        "FusedSGD": "set_device_schedule.step", "plan": "max_transitions layers make_optimizer amp_dtype loader",
        "training": "train.reporter compare.kinds compare.t_0s compare.how_scales",
        "TrainConfig": " ".join(field.name for field in fields(TrainConfig) if field.default is None),
    }),
    ("none of them", ("0",), {
        "FreezeOut": "start_frozen warmup_steps freeze_to.num_frozen thaw_to.num_frozen", "plan": "warmup_steps",
        "Schedule": "warmup_steps start_frozen", "Layers": "count_through.last",
        "TrainConfig": "warmup_steps start_frozen lr momentum weight_decay warmup_epochs val_fraction",
    }),
    ("none of them", ("list",), {"FreezeOut": "schedulers", "training": "compare.shorter"}),
    ("none of them", ("list", "dict"), {
        "Layers": "layers given", "training": "plan.t_0s plan.how_scales", "plan": "t_0s how_scales",
    }),
    ("the default", ("list",), {"training": "compare.t_0s compare.how_scales compare.accuracies"}),
    ("the first one", ("0",), {
        "FreezeOut": "anneals_as.i", "Schedule": "t.i milestone.i lr_factor.i", "GraphedStep": "step_count.step_count",
        "FeatureCache": "loader.rank",
    }),
    ("a step", ("0", "half", "inf", "huge"), {"Schedule": "lr_factor.step num_frozen.step next_milestone.step"}),
    ("a seed", ("-1", "0"), {"FeatureCache": "seed loader.seed"}),
    ("a seed", ("0",), {"TrainConfig": "seed"}),
    ("a fraction", ("half",), {"FreezeOut": "t_0", "Schedule": "t_0", "TrainConfig": "val_fraction t_0"}),
    ("a power", ("half", "huge"), {"FreezeOut": "how_scale", "Schedule": "how_scale", "TrainConfig": "how_scale"}),
    ("powers 48, 46 and 53", ("bytes",), {"training": "compare.how_scales plan.how_scales", "plan": "how_scales"}),
    ("a number", ("half", "huge"), {"TrainConfig": "lr momentum weight_decay warmup_epochs"}),
    ("a time; 0 is one round", ("0", "half", "huge", "inf", "True"), {
        "training": "plan.max_seconds", "plan": "max_seconds",
    }),
    ("max_seconds ends them", ("huge",), {"training": "plan.rounds", "plan": "rounds"}),
    ("as many as there are", ("huge",), {
        "FreezeOut": "max_transitions", "Schedule": "max_transitions", "plan": "max_transitions",
        "FeatureCache": "limit loader.batch_size", "TrainConfig": "max_transitions batch_size",
    }),
    ("a long run", ("huge",), {
        "FreezeOut": "total_steps", "Schedule": "total_steps", "plan": "total_steps",
        "GraphedStep": "step_count.step_count",
    }),
    ("a process with no samples", ("huge",), {"FeatureCache": "loader.world_size"}),
    ("net, schedule or memory judge it", ("huge",), {"TrainConfig": "image_size warmup_steps start_frozen views"}),
    ("can be called", ("module", "class"), {
        "FreezeOut": "register_transition_hook.hook", "GraphedStep": "criterion", "FeatureCache": "loader.collate_fn",
    }),
    ("a folder, a file or a name", ("str",), {
        "FeatureCache": "store loader.key_name", "training": "train.out compare.out",
        "TrainConfig": "weights fingerprint cache",
    }),
    ("a name; the task judges it", ("str",), {"TrainConfig": "data model start_frozen"}),
    ("only a name for messages", tuple(KINDS), {"Layers": "count_through.argument"}),
    ("a model", ("module",), {"find_layers": "model"}),
    ("has a length and items; their use is checked", ("str", "bytes", "list", "list of objects", "dict", "tensor"), {
        "FeatureCache": "dataset",
    }),
    ("only its wait is measured", ("str", "bytes", "generator", "tensor"), {"plan": "loader"}),
    ("unused by this model", ("tensor",), {"FeatureCache": "samples.lengths"}),
]  # fmt: skip
ACCEPTED: dict[str, set[str]] = {}
for _reason, kinds, places in FINE:
    for owner, names in places.items():
        for argument in names.split():
            ACCEPTED.setdefault(f"{owner}.{argument}", set()).update(kinds)
# Messages that name something else, with what they name.
NAMED = {
    "FreezeOut.freeze_to.num_frozen": "freeze_to",
    "FreezeOut.thaw_to.num_frozen": "thaw_to",
    "FreezeOut.model": "model|optimizer must hold every trainable parameter",  # of another model
    **{f"{name}.t_0s": "t_0" for name in ("plan", "training.plan", "training.compare")},
    **{f"{name}.how_scales": "how_scale" for name in ("plan", "training.plan", "training.compare")},
    "training.compare.kinds": "kinds|arms",
}
# What only the user's own model or criterion can judge: their error, whatever it names.
USERS = {
    "GraphedStep().inputs", "GraphedStep().targets", "plan.model", "plan.example_inputs", "plan.targets",
    "plan.criterion", "plan.make_optimizer",
}  # fmt: skip


def arguments() -> list[str]:
    found = []
    for name, make in CALLS.items():
        parameters = inspect.signature(make().function).parameters.values()
        found += [f"{name}.{p.name}" for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", arguments())
def test_a_wrong_argument_is_named_and_nothing_is_done(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a str may be taken for a folder
    name, argument = place.rsplit(".", 1)
    accepted = set()
    for kind, value in KINDS.items():
        case = CALLS[name]()
        before = case.state()
        try:
            case.function(**{**case.given, argument: value()})
        except (TypeError, ValueError, RuntimeError, BadInput) as error:
            named = re.search(NAMED.get(place, argument), str(error)) or "closed file" in str(error)
            assert named or place in USERS, f"{kind}: {type(error).__name__}: {error}"
            assert case.state() == before, f"{kind}: {error}"
        else:
            accepted.add(kind)
    assert accepted == ACCEPTED.get(place, set())


def test_the_public_names_are_all_called() -> None:
    records = {"Layer", "Transition"}  # written here, read by the user
    optimizers = {"FusedSGD", "FusedAdam", "FusedAdamW"}  # below
    nothing_to_give = {"__version__", "build_info"}
    called = {name.partition(".")[0].removesuffix("()") for name in CALLS}
    assert set(freezeout_ext.__all__) <= called | records | optimizers | nothing_to_give
    assert {f"training.{name}" for name in training.__all__} <= set(CALLS)


@pytest.mark.parametrize("kind", [FusedSGD, FusedAdam, FusedAdamW])
def test_an_optimizer_refuses_what_torchs_own_refuses_with_the_same_words(kind: type) -> None:
    theirs = getattr(torch.optim, kind.__name__.removeprefix("Fused"))
    refused = 0
    for argument in inspect.signature(theirs).parameters:
        for value in KINDS.values():
            if value is closed_file:  # its address is in the words
                continue
            given = {"params": [torch.nn.Parameter(torch.ones(2))]}
            found = []
            for each in (kind, theirs):
                torch.manual_seed(0)
                try:
                    each(**{**given, argument: value()})
                except Exception as error:
                    found.append((type(error), re.sub("0x[0-9a-f]+", "", str(error)).replace("Fused", "")))
            assert len(set(found)) <= 1 and len(found) in (0, 2), (argument, found)
            refused += len(found) // 2
    assert refused > 40
