"""Test accuracy of FreezeOut with each mode of the frozen prefix over seeds: digits, WRN-16-1, 8x8 images.

    python bench/bench_prefix_accuracy.py --seeds 5 --json bench/results/prefix_accuracy.json

All modes have the same seeds, data order and schedule. Nothing depends on the clock (measure_prefix=False).
"off" is plain freezing. "exact" must end in the same weights, bit for bit.
"""

import argparse
from pathlib import Path
from statistics import fmean, stdev

import torch
import torch.nn.functional as F

from freezeout_ext import FreezeOut, FusedSGD
from freezeout_ext.models import build_model
from freezeout_ext.prefix.cpu import unsupported_dtype
from freezeout_ext.tasks import batches
from freezeout_ext.tasks.images import DataSplits, load_data
from freezeout_ext.training.measure import conditions
from freezeout_ext.training.run_folder import write_json


def train(data: DataSplits, mode: str, seed: int, args: argparse.Namespace) -> tuple[float, dict, dict]:
    """-> test accuracy, the final weights, what the last prefix reported."""
    torch.manual_seed(seed)
    channels, size, _ = data.image_shape
    model = build_model(args.model, data.num_classes, in_channels=channels, image_size=size).train()
    optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    steps = len(data.train) // args.batch_size
    freezeout = FreezeOut(
        model, optimizer, total_steps=args.epochs * steps, t_0=args.t_0, prefix=mode, measure_prefix=False
    )
    for epoch in range(args.epochs):
        images = data.train.dataset(augment=True)
        for inputs, targets in batches(images, args.batch_size, shuffle=True, seed=seed, epoch=epoch, drop_last=True):
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            freezeout.step()
    report = freezeout.prefix_report()
    told = {"route": report.route, "num_frozen": report.num_frozen, "units": report.units, "error": report.error}
    freezeout.close()  # so that the modules themselves are evaluated
    model.eval()
    with torch.no_grad():
        correct = sum((model(x).argmax(1) == y).sum().item() for x, y in batches(data.test.dataset(), 450))
    return 100 * correct / len(data.test), model.state_dict(), told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="wrn-16-1")
    add("--data", default="digits")
    add("--data-dir", type=Path)
    add("--epochs", type=int, default=30)
    add("--batch-size", type=int, default=64)
    add("--t-0", type=float, default=0.5)
    add("--seeds", type=int, default=5)
    add("--threads", type=int, default=1)
    add("--json", type=Path, default=Path("prefix_accuracy.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = load_data(args.data, args.data_dir)
    modes = ["off", "exact", "folded"] + ["bf16"] * (unsupported_dtype(torch.bfloat16) is None)
    found: dict[str, dict] = {mode: {"accuracy": [], "prefix": []} for mode in modes}
    for seed in range(args.seeds):
        plain: dict = {}
        for mode in modes:
            accuracy, weights, told = train(data, mode, seed, args)
            found[mode]["accuracy"].append(accuracy)
            found[mode]["prefix"].append(told)
            if mode == "off":
                plain = weights
            elif mode == "exact" and not all(torch.equal(value, weights[key]) for key, value in plain.items()):
                raise SystemExit(f"seed {seed}: exact does not end in the weights of plain freezing")
            print(f"seed {seed} {mode}: {accuracy:.2f} %, {told}", flush=True)
    print(f"\n{'mode':8} {'mean':>7} {'sd':>6} {'n':>3}   test accuracy in %")
    for mode, each in found.items():
        values = each["accuracy"]
        each |= {"mean": fmean(values), "sd": stdev(values) if len(values) > 1 else None, "n": len(values)}
        print(f"{mode:8} {each['mean']:7.2f} {each['sd'] or 0:6.2f} {each['n']:3}")
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "data_dir")}
    write_json(
        args.json, {"modes": found, "settings": settings, "data": data.conditions} | conditions(torch.device("cpu"))
    )


if __name__ == "__main__":
    main()
