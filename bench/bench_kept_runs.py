"""Whole runs on real CIFAR-100: full training, freezing, freezing with kept features, and cosines as short as these.

    python bench/bench_kept_runs.py --data-dir DIR --task finetune --out OUT --seeds 5
    python bench/bench_kept_runs.py --data-dir DIR --task scratch --out OUT --seeds 5
    python bench/bench_kept_runs.py --task finetune --out OUT --json bench/results/kept_runs.json   # what is there

DIR holds the official cifar-100-python folder with all 10,000 test images. finetune: a small VGG trained on 50 classes
(5 epochs), then on the other 50 with 40 images a class for 8 epochs; the test is the 5,000 official images of these 50.
scratch: the same net on 10,000 images of all classes for 5 epochs, tested on all 10,000. Batch 32, SGD Nesterov 0.9,
weight decay 1e-4, rate 0.1 on one cosine over the run in all arms, channels-last, crop and flip: fresh ones for runs
that keep nothing, K fixed views for runs that do. One thread. Seconds are CPU seconds of the process from the first
batch to the last: filling counts, other work on the machine does not. Evaluation, once at the end, does not count.

"ahead": accuracy over full training at the same CPU seconds, interpolated between the short runs of the same seed,
linear in log(seconds), paired over seeds. Each run is a line in OUT/<task>.jsonl; runs that are there are not repeated.
"""

import argparse
import json
import math
import platform
import statistics
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from freezeout_ext import FeatureCache, FreezeOut, FusedSGD
from freezeout_ext.models import build_model
from freezeout_ext.tasks.images import Split, batches, load_data
from freezeout_ext.training.compare import paired_test

NET, BATCH, RATE = "vgg-11-x0.125", 32, 0.1
PRETRAIN_EPOCHS, FINETUNE_EPOCHS, SCRATCH_EPOCHS = 5, 8, 5
PER_CLASS = 40
DTYPES = {"": None, "bfloat16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    start: layers frozen before the first step. tail: t_0 of linear milestones of the rest; None: the rest trains on.
    cubic: t_0 of the paper's milestones, without a start. views: K of kept features, 0 where nothing is kept.
    length: of the run, over the full one's epochs. adapt: batch norm of the frozen part is re-estimated by one pass.
    rate: of the layers that train, over the others' arms.
    """

    name: str
    start: int = 0
    tail: float | None = None
    cubic: float | None = None
    views: int = 0
    dtype: str = ""
    length: float = 1.0
    adapt: bool = False
    rate: float = 1.0


FULL = [Arm("full"), *(Arm(f"short {100 * f:.0f} %", length=f) for f in (0.75, 0.6, 0.4, 0.25, 0.12))]
FROZEN = [
    Arm("first 4 frozen", 4),
    Arm("first 6 frozen", 6),
    Arm("first 2 frozen, tail from 0.2", 2, 0.2),
    Arm("first 4 frozen, tail from 0.4", 4, 0.4),
]
FINETUNE = [
    *FULL,
    *FROZEN,
    *(replace(arm, name=f"{arm.name}, K = {k}", views=k) for arm in FROZEN for k in (1, 2, 4)),
    Arm("first 6 frozen, K = 4, bfloat16", 6, views=4, dtype="bfloat16"),
    Arm("first 6 frozen, K = 4, int8", 6, views=4, dtype="int8"),
    Arm("first 6 frozen, K = 1, int8", 6, views=1, dtype="int8"),
    Arm("first 6 frozen, K = 1, adapted", 6, views=1, adapt=True),
    Arm("first 4 frozen, K = 1, adapted", 4, views=1, adapt=True),
    Arm("first 6 frozen, K = 1, rate x 0.5", 6, views=1, rate=0.5),
    Arm("first 6 frozen, K = 1, rate x 2", 6, views=1, rate=2.0),
]
SCRATCH = [
    *FULL,
    *(Arm(f"cubic {t}{f', K = {k}' if k else ''}", cubic=t, views=k) for t in (0.8, 0.62) for k in (0, 1, 2, 4)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--task", choices=("finetune", "scratch"), default="finetune")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="*", help="names; all by default")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    arms = FINETUNE if args.task == "finetune" else SCRATCH
    log = args.out / f"{args.task}.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    if args.data_dir is not None:
        done = {(row["arm"]["name"], row["seed"]) for row in read(log)}
        data = load_data("cifar100", args.data_dir)
        if len(data.test) != 10_000:
            raise SystemExit(
                f"the test split must be the official 10,000 images, {args.data_dir} has {len(data.test):,}"
            )
        pretrained = pretrain(data, args.out) if args.task == "finetune" else None
        # Seed by seed, so that what is there at any time is paired.
        for seed in range(args.seeds):
            for arm in arms:
                if (arm.name, seed) in done or (args.arms and arm.name not in args.arms):
                    continue
                row = {"arm": asdict(arm), "seed": seed, **run(args.task, arm, seed, data, pretrained)}
                with open(log, "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    f"{args.task} seed {seed} {arm.name}: {row['accuracy']:.2f} % in {row['cpu_seconds']:.1f} s",
                    flush=True,
                )
    table = summary(read(log))
    print_table(table)
    if args.json is not None:
        conditions = {
            "task": args.task,
            "net": NET,
            "torch": torch.__version__,
            "machine": platform.processor(),
            "threads": 1,
        }
        args.json.write_text(json.dumps({"conditions": conditions, "arms": table}, indent=1) + "\n")


# Data


def classes_of(data, *, first: bool) -> torch.Tensor:
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1706))
    return order[:50] if first else order[50:]


def only(split: Split, classes: torch.Tensor, per_class: int | None = None, seed: int = 0) -> Split:
    """The images of these classes, numbered anew; `per_class` of each, drawn by seed."""
    number = torch.full((100,), -1)
    number[classes] = torch.arange(len(classes))
    labels = number[split.labels]
    chosen = (labels >= 0).nonzero().squeeze(1)
    if per_class is not None:
        generator = torch.Generator().manual_seed(seed)
        chosen = chosen[torch.randperm(len(chosen), generator=generator)]
        chosen = torch.cat([chosen[labels[chosen] == c][:per_class] for c in range(len(classes))])
    return replace(split, images=split.images[chosen], labels=labels[chosen])


def task_data(task: str, data, seed: int) -> tuple[Split, Split, int]:
    if task == "finetune":
        classes = classes_of(data, first=False)
        return only(data.train, classes, PER_CLASS, seed), only(data.test, classes), 50
    every = torch.arange(100)
    return only(data.train, every, 100, seed=0), data.test, 100


def pretrain(data, out: Path) -> dict:
    """The weights after five epochs on the first 50 classes, made once."""
    path = out / "pretrained.pt"
    if not path.exists():
        classes = classes_of(data, first=True)
        torch.manual_seed(0)
        model = build_model(NET, 50).to(memory_format=torch.channels_last)
        found = train(model, only(data.train, classes), Arm("full"), PRETRAIN_EPOCHS, seed=0)
        found |= evaluate(model, only(data.test, classes))
        print(f"pretrained: {found['accuracy']:.2f} % on its own classes", flush=True)
        torch.save(model.state_dict(), path)
    return torch.load(path)


# One run


def run(task: str, arm: Arm, seed: int, data, pretrained: dict | None) -> dict:
    train_split, test_split, num_classes = task_data(task, data, seed)
    torch.manual_seed(seed)
    model = build_model(NET, num_classes).to(memory_format=torch.channels_last)
    if pretrained is not None:
        last = list(model.state_dict())[-2:]
        model.load_state_dict({k: v for k, v in pretrained.items() if k not in last}, strict=False)
    epochs = FINETUNE_EPOCHS if task == "finetune" else SCRATCH_EPOCHS
    return train(model, train_split, arm, epochs, seed) | evaluate(model, test_split)


def train(model: nn.Module, split: Split, arm: Arm, epochs: int, seed: int) -> dict:
    views = replace(split, augmented=True)
    optimizer = FusedSGD(model.parameters(), lr=RATE * arm.rate, momentum=0.9, nesterov=True, weight_decay=1e-4)
    cache = FeatureCache(views, views=max(arm.views, 1), dtype=DTYPES[arm.dtype], seed=seed)
    loader = cache.loader(BATCH)
    total = round(arm.length * epochs * len(loader))
    started, freezeout = time.process_time(), None
    if arm.adapt:
        adapt(model, views)
    if arm.start or arm.cubic:
        rule = (
            {"t_0": arm.cubic, "how_scale": "cubic"} if arm.cubic else {"t_0": arm.tail or 1.0, "how_scale": "linear"}
        )
        freezeout = FreezeOut(
            model, optimizer, total_steps=total, start_frozen=arm.start, anneal=False,
            cache=cache if arm.views else None, **rule,
        )  # fmt: skip
    # After FreezeOut, which splits the groups.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / total)))
    step = 0
    model.train()
    while step < total:
        for inputs, targets, keys in loader:
            inputs = inputs.contiguous(memory_format=torch.channels_last) if inputs.stride()[-1] else inputs
            if arm.views:
                with cache.samples(keys):
                    loss = nn.functional.cross_entropy(model(inputs), targets)
            else:
                loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if freezeout:
                freezeout.step()
            step += 1
            if step == total:
                break
    seconds = time.process_time() - started
    report = cache.report() if arm.views else None
    found = {"cpu_seconds": seconds, "steps": total}
    if report:
        found |= {"bytes": report.bytes, "hits": report.hits, "pushed": report.pushed, "misses": report.misses}
        found |= {"gather_ms": report.gather_ms, "prefix_ms": report.prefix_ms, "notes": list(report.notes)}
    cache.close()
    return found


@torch.no_grad()
def adapt(model: nn.Module, views: Split) -> None:
    """Running statistics of all batch norms: the mean over one pass of the new images, in training mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
    model.train()
    for samples in torch.arange(len(views)).split(200):
        model(views.batch(samples, samples * 2**33).contiguous(memory_format=torch.channels_last))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> dict:
    model.eval()
    loss = correct = 0.0
    for inputs, targets in batches(split, 500):
        outputs = model(inputs.contiguous(memory_format=torch.channels_last))
        loss += float(nn.functional.cross_entropy(outputs, targets, reduction="sum"))
        correct += int((outputs.argmax(1) == targets).sum())
    return {"accuracy": 100 * correct / len(split), "loss": loss / len(split)}


# Results


def read(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def summary(rows: list[dict]) -> list[dict]:
    """One entry an arm: means, and pairs with full training and with the short cosine at the same seconds."""
    by_seed: dict[int, dict[str, dict]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], {})[row["arm"]["name"]] = row
    table = []
    for name in dict.fromkeys(row["arm"]["name"] for row in rows):
        runs = [(seed, found[name]) for seed, found in by_seed.items() if name in found]
        entry = {"arm": runs[0][1]["arm"], "n": len(runs)}
        for number in ("accuracy", "loss", "cpu_seconds"):
            values = [row[number] for _, row in runs]
            entry[number] = [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None]
        for number in ("bytes", "gather_ms", "prefix_ms"):
            if number in runs[0][1]:
                entry[number] = runs[0][1][number]
        pairs = [(row, by_seed[seed]["full"]) for seed, row in runs if "full" in by_seed[seed]]
        entry["seconds_over_full"] = (
            [statistics.fmean(r["cpu_seconds"] / f["cpu_seconds"] for r, f in pairs)] if pairs else None
        )
        entry["minus_full"] = paired_test([r["accuracy"] - f["accuracy"] for r, f in pairs])
        entry["loss_minus_full"] = paired_test([r["loss"] - f["loss"] for r, f in pairs])
        for number, sign in (("accuracy", "ahead"), ("loss", "loss_ahead")):
            rivals = [(row, rival(by_seed[seed], row["cpu_seconds"], number)) for seed, row in runs]
            found = [row[number] - other for row, other in rivals if other is not None]
            # The short runs are their own rivals.
            entry[sign] = paired_test(found) if not name.startswith(("full", "short")) else None
        table.append(entry)
    return table


def rival(runs: dict[str, dict], seconds: float, number: str) -> float | None:
    """What full training with this seed reaches in as many CPU seconds; None outside what was run."""
    points = sorted((r["cpu_seconds"], r[number]) for name, r in runs.items() if name.startswith(("full", "short")))
    for (s, a), (t, b) in pairwise(points):
        if s <= seconds <= t:
            share = (math.log(seconds) - math.log(s)) / (math.log(t) - math.log(s))
            return a + share * (b - a)
    return None


def print_table(table: list[dict]) -> None:
    def pair(test: dict | None, digits: int = 2) -> str:
        if test is None:
            return ""
        error = "" if test["low"] is None else f" +- {(test['high'] - test['low']) / 2:.{digits}f}"
        p = "" if test["p"] is None else f" (p {test['p']:.3f}, n {test['n']})"
        return f"{test['mean']:+.{digits}f}{error}{p}"

    print(
        "| arm | n | CPU s | over full's | accuracy | - full | ahead (95 %) | loss ahead |"
        "\n|---|---|---|---|---|---|---|---|"
    )
    for e in table:
        sd = f" +- {e['accuracy'][1]:.2f}" if e["accuracy"][1] is not None else ""
        share = f"{e['seconds_over_full'][0]:.2f}" if e["seconds_over_full"] else ""
        print(
            f"| {e['arm']['name']} | {e['n']} | {e['cpu_seconds'][0]:.1f} | {share} | {e['accuracy'][0]:.2f}{sd} "
            f"| {pair(e['minus_full'])} | {pair(e['ahead'])} | {pair(e['loss_ahead'], 3)} |"
        )


if __name__ == "__main__":
    main()
