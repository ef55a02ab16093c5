"""What bench/gpu.sh measured, as one JSON file and a table.

    python bench/gpu_report.py --work build/gpu --out gpu-results

Reads WORK/benchmarks/*.json (pytest-benchmark), WORK/*.xml (JUnit), WORK/logs/sanitize-*.log, WORK/claim and
WORK/paper; writes OUT/DEVICE.json, OUT/logs.tar.gz (logs and the benchmarks' own files), OUT/runs.tar.gz,
OUT/compare.png and OUT/figure.html. A figure that was not measured stays in the table as such.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from gpu_targets import TARGETS, Tests

from freezeout_ext.text import table


def read_benchmarks(folder: Path) -> Tests:
    tests: Tests = {}
    for path in sorted(folder.glob("*.json")):
        try:
            entries = json.loads(path.read_text())["benchmarks"]
        except ValueError:
            print(f"{path} holds no benchmarks: it was stopped before it wrote them")
            continue
        for entry in entries:
            tests[entry["name"]] = entry["extra_info"] | {
                "params": entry["params"] or {},
                "median_seconds": entry["stats"]["median"],
                "file": path.stem,
            }
    return tests


def read_junit(paths: Iterable[Path]) -> dict[str, dict]:
    suites = {}
    for path in paths:
        try:
            root = ElementTree.parse(path).getroot()
        except ElementTree.ParseError:
            continue  # the run was stopped while it was written
        suite = root if root.tag == "testsuite" else root.find("testsuite")
        counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        cases = list(suite.iter("testcase"))
        bad = [c for what in ("failure", "error") for c in cases if c.find(what) is not None]
        names = [f"{c.get('classname')}::{c.get('name')}" for c in bad]
        suites[path.stem] = {**counts, "seconds": float(suite.get("time", 0)), "failed": names}
    return suites


def read_sanitizers(folder: Path) -> dict[str, dict]:
    """{"sanitize-memcheck-kernels": {"errors": 0, "passed": 12}}; None where the log does not say."""
    found = {}
    for path in sorted(folder.glob("sanitize-*.log")):
        text = path.read_text(errors="replace")
        # racecheck closes with hazards displayed, and "(0 errors, 0 warnings)".
        errors = [int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) error", text)]
        errors += [int(n) for n in re.findall(r"RACECHECK SUMMARY: (\d+) hazard", text)]
        passed = re.findall(r"(\d+) passed", text)
        found[path.stem] = {"errors": sum(errors) if errors else None, "passed": int(passed[-1]) if passed else None}
    return found


def claim_rows(compare: dict | None) -> list[dict]:
    """Accuracy and seconds of each arm of the claim. They are only stated, since no figure was asked for."""
    rows = []
    for arm in compare["arms"] if compare else []:
        name = (
            f"{compare['config']['model']}, {compare['config']['data']}, {arm['name']}, n={arm['test_accuracy']['n']}"
        )
        found = {"test accuracy, %": 100 * arm["test_accuracy"]["mean"], "seconds": arm["train_seconds"]["mean"]}
        if "seconds_over_full" in arm:
            found["time saved, %"] = 100 * (1 - arm["seconds_over_full"]["mean"])
        rows += [
            {"figure": f"{name}: {what}", "target": "-", "measured": x, "reached": None} for what, x in found.items()
        ]
    return rows


def rows_of(tests: Tests, suites: dict[str, dict], sanitizers: dict[str, dict]) -> list[dict]:
    rows = []
    for target in TARGETS:
        measured = target.find(tests)
        reached = None
        if measured is not None and target.sense:
            reached = measured >= target.wanted if target.sense == ">=" else measured <= target.wanted
        wanted = f"{target.sense} {target.wanted:g} {target.unit}".strip() if target.sense else "-"
        rows.append({"figure": target.figure, "target": wanted, "measured": measured, "reached": reached})
    for name, suite in suites.items():
        bad = suite["failures"] + suite["errors"]
        ran = suite["tests"] - suite["skipped"]
        rows.append(
            {"figure": f"{name}: failed of {ran} run", "target": "<= 0", "measured": bad, "reached": bad == 0 < ran}
        )
    for name, log in sanitizers.items():
        ok = None if log["errors"] is None else log["errors"] == 0 and bool(log["passed"])
        figure = f"{name}: errors in {log['passed'] or 0} tests"
        rows.append({"figure": figure, "target": "<= 0", "measured": log["errors"], "reached": ok})
    return rows


def figures_table(rows: list[dict]) -> str:
    cells = [("figure", "target", "measured", "reached")]
    for row in rows:
        measured = "not measured" if row["measured"] is None else f"{row['measured']:.3g}"
        cells.append((row["figure"], row["target"], measured, {None: "-", True: "yes", False: "NO"}[row["reached"]]))
    return table(cells, left=range(4), rule=False)


def machine() -> dict:
    """Device, driver, versions, commit, date."""
    import torch

    from freezeout_ext import build_info
    from freezeout_ext.training.measure import conditions

    def first_line(*command: str) -> str | None:
        try:
            lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
        except (OSError, subprocess.SubprocessError):
            return None
        return lines[0].strip() if lines else None

    where = conditions(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        **where,
        "commit": os.environ.get("COMMIT") or where["commit"],
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks": first_line(
            "nvidia-smi", "--query-gpu=clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader"
        ),
        "triton": import_module("triton").__version__ if find_spec("triton") else None,
        "nvcc": first_line("sh", "-c", "nvcc --version | tail -n 1"),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "build": build_info(),
    }


def archive(path: Path, root: Path, files: Iterable[Path]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for file in files:
            tar.add(file, file.relative_to(root))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    tests = read_benchmarks(args.work / "benchmarks")
    suites, sanitizers = read_junit(sorted(args.work.glob("*.xml"))), read_sanitizers(args.work / "logs")
    claim = args.work / "claim"
    compare = json.loads((claim / "compare.json").read_text()) if (claim / "compare.json").exists() else None
    rows = rows_of(tests, suites, sanitizers) + claim_rows(compare)
    where = machine()
    report = {
        **where, "figures": rows, "tests": suites, "sanitizers": sanitizers, "benchmarks": tests, "claim": compare,
    }  # fmt: skip
    name = re.sub(r"[^A-Za-z0-9]+", "-", where["device"]).strip("-").lower()
    (args.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    logs = [*sorted((args.work / "logs").glob("*.log")), *sorted((args.work / "benchmarks").glob("*.json"))]
    archive(args.out / "logs.tar.gz", args.work, logs)
    kept = {"config.json", "log.jsonl", "result.json", "compare.json", "costs.json"}
    runs = [p for folder in (claim, args.work / "paper") for p in sorted(folder.rglob("*")) if p.name in kept]
    archive(args.out / "runs.tar.gz", args.work, runs)
    for picture in (claim / "compare.png", *sorted(args.work.glob("paper/*/figure.html"))[-1:]):
        if picture.exists():
            shutil.copy(picture, args.out / picture.name)
    print(
        f"{where['device']}, driver {where['driver']}, torch {where['torch']}, triton {where['triton']},"
        f" commit {where['commit']}, {where['date']}"
    )
    print(figures_table(rows))
    print(f"written to {args.out}: {', '.join(sorted(p.name for p in args.out.iterdir()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
