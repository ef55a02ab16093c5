"""bench/gpu_report.py on benchmarks that ran here with few steps, and bench/gpu.sh's own words."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from load_script import BENCH, load_script

ROOT = Path(__file__).parents[1]
# Real measurements of tiny nets, under the parameters of the figures that they stand for.
TINY = """
import pytest
import torch
import bench_fused
import bench_training_step as steps

bench_fused.SECONDS["sgd"] = 0.05
steps.WARM_UP_STEPS = steps.COMPARED_STEPS + 1


@pytest.mark.parametrize("cache", ["warm"])
@pytest.mark.parametrize("grouping", ["one group a layer"])
@pytest.mark.parametrize("net", ["densenet-76-12"])
def test_step(benchmark, net, grouping, cache):
    bench_fused.measure(benchmark, "sgd", "tiny-1", grouping, threads=1)


@pytest.mark.parametrize("frozen", [0.5])
@pytest.mark.parametrize("net", ["densenet-76-12"])
def test_training_step(benchmark, net, frozen):
    case = steps.Case("wrn-10-1", frozen, batch=4, image=8, device=torch.device("cpu"), amp=None)
    found, arms = steps.measure(case, rounds=1, steps=1)
    benchmark.extra_info |= found
    benchmark.pedantic(arms["ours"].next, rounds=1)
"""


@pytest.fixture(scope="module")
def report():
    load_script(BENCH / "gpu_targets.py")
    return load_script(BENCH / "gpu_report.py")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """What two parts of bench/gpu.sh leave behind."""
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    work = tmp_path_factory.mktemp("work")
    for folder in ("benchmarks", "logs", "claim/runs/full/seed-0"):
        (work / folder).mkdir(parents=True)
    (work / "test_tiny.py").write_text(TINY)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(BENCH), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    environment.pop("PYTEST_XDIST_WORKER", None)  # pytest-benchmark measures nothing in a worker
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_tiny.py",
         "--benchmark-json=benchmarks/tiny.json", "--junitxml=tests-gpu.xml"],
        cwd=work, env=environment, check=True, capture_output=True,
    )  # fmt: skip
    (work / "benchmarks" / "stopped.json").write_text("")
    (work / "logs" / "sanitize-memcheck-kernels.log").write_text("12 passed\n========= ERROR SUMMARY: 0 errors\n")
    (work / "logs" / "sanitize-racecheck-kernels.log").write_text(
        "11 passed\n========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n"
    )
    (work / "logs" / "sanitize-initcheck-kernels.log").write_text("Device not supported\n")
    (work / "claim" / "runs" / "full" / "seed-0" / "log.jsonl").write_text("{}\n")
    (work / "claim" / "runs" / "full" / "seed-0" / "checkpoint.pt").write_bytes(b"large")
    return work


def test_one_file_and_a_table(report, work, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COMMIT", "0123abcd")
    assert report.main(["--work", str(work), "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert {"device", "driver", "torch", "triton", "commit", "date", "benchmarks", "figures"} <= found.keys()
    assert found["commit"] == "0123abcd" and "commit 0123abcd" in shown
    rows = {row["figure"]: row for row in found["figures"]}
    optimizer = rows["optimizer, DenseNet-76-12, one group a layer: torch fused over ours"]
    assert optimizer["measured"] > 1 and optimizer["reached"] == (optimizer["measured"] >= 20)
    step = rows["step, DenseNet-76-12, 50 % frozen: authors' over GraphedStep with prefix"]
    assert step["measured"] > 0 and step["reached"] == (step["measured"] >= 3) and step["target"] == ">= 3 x"
    unmeasured = rows["prefix bf16, half of WRN-40-4: over eager"]
    assert (unmeasured["measured"], unmeasured["reached"]) == (None, None)
    assert rows["tests-gpu: failed of 2 run"]["reached"] is True
    assert rows["sanitize-memcheck-kernels: errors in 12 tests"]["reached"] is True
    assert rows["sanitize-racecheck-kernels: errors in 11 tests"]["reached"] is False
    assert rows["sanitize-initcheck-kernels: errors in 0 tests"]["reached"] is None
    lines = shown.splitlines()
    assert any("not measured" in line and line.endswith("-") for line in lines)
    assert any(line.startswith("sanitize-racecheck") and line.endswith("NO") for line in lines)
    assert "stopped.json holds no benchmarks" in shown
    with tarfile.open(tmp_path / "runs.tar.gz") as tar:
        assert tar.getnames() == [
            "claim/runs/full/seed-0/log.jsonl"
        ]  # no checkpoint: it may be larger than what comes back
    with tarfile.open(tmp_path / "logs.tar.gz") as tar:
        assert "benchmarks/tiny.json" in tar.getnames()
    assert len(list(tmp_path.iterdir())) <= 8


def test_figures_of_a_gpu_are_found_by_their_benchmarks(report):
    """As bench_kernels.py and bench_fused.py name and store them: those files do not run here."""
    tests = {
        "test_prefix[densenet-76-12]": {
            "params": {"name": "densenet-76-12"}, "over_eager": {"eager": 1.0, "engine": 0.2},
            "gigabytes_per_second": 1500.0, "teraflops_per_second": 79.0,
        },
        "test_prefix_compiled[densenet-76-12]": {
            "params": {"name": "densenet-76-12"}, "microseconds": {"engine": 300.0, "torch.compile": 400.0},
        },
        "test_ceilings": {
            "params": {}, "copy_terabytes_per_second": 3.0, "bf16_teraflops_per_second": 790.0,
        },
        "test_bandwidth": {"params": {}, "over_copy": 1.25},
    }  # fmt: skip
    rows = {row["figure"]: (row["measured"], row["reached"]) for row in report.rows_of(tests, {}, {})}
    assert rows["prefix bf16, half of DenseNet-76-12: over eager"] == (0.2, True)
    assert rows["the same, second goal"] == (0.2, False)
    assert (0.75, True) in [
        row for figure, row in rows.items() if figure.endswith("DenseNet-76-12, over torch.compile")
    ]
    assert rows["prefix bf16, half of DenseNet-76-12: share of the roofline"] == (50.0, None)
    assert rows["optimizer, 100 M parameters: share of the copy bandwidth"] == (80.0, False)
    text = (BENCH / "bench_kernels.py").read_text()
    for word in ("def test_prefix(", "def test_prefix_compiled(", "def test_ceilings(", '"copy_terabytes_per_second"',
                 '"bf16_teraflops_per_second"', '"over_eager"', '"microseconds"', '"torch.compile"'):  # fmt: skip
        assert word in text
    assert 'f"over_copy{suffix}"' in (BENCH / "bench_fused.py").read_text()


def test_the_claim_is_stated(report):
    def spread(mean):
        return {"mean": mean, "sd": 0.0, "n": 2}

    compare = {
        "config": {"model": "wrn-40-4", "data": "cifar100"},
        "arms": [
            {"name": "full", "test_accuracy": spread(0.78), "train_seconds": spread(300.0)},
            {"name": "freezeout cubic 0.8", "test_accuracy": spread(0.77), "train_seconds": spread(240.0),
             "seconds_over_full": spread(0.8)},
        ],
    }  # fmt: skip
    rows = {row["figure"]: row["measured"] for row in report.claim_rows(compare)}
    name = "wrn-40-4, cifar100, freezeout cubic 0.8, n=2"
    assert rows[f"{name}: test accuracy, %"] == 77 and rows[f"{name}: seconds"] == 240
    assert rows[f"{name}: time saved, %"] == pytest.approx(20) and report.claim_rows(None) == []


@pytest.fixture
def bare(monkeypatch):
    """None of the script's own settings."""
    for name in ("CIFAR", "RUNS", "MINUTES", "SEEDS", "EPOCHS", "BATCH", "ARMS", "FIGURE", "SETTING", "NETS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("bare")
def test_the_script_runs_in_a_posix_shell(tmp_path):
    subprocess.run(["sh", "-n", str(BENCH / "gpu.sh")], check=True)
    given = {
        "OUT": str(tmp_path / "out"),
        "WORK": str(tmp_path / "work"),
        "PYTHON": sys.executable,
        "COMMIT": "4567cdef",
    }

    def run(*parts):
        command = ["sh", str(BENCH / "gpu.sh"), *parts]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **given})

    done = run("train")
    assert done.returncode == 1 and "train needs CIFAR=folder" in done.stdout
    # The report comes at the end of every call.
    (path,) = (tmp_path / "out").glob("*.json")
    assert json.loads(path.read_text())["commit"] == "4567cdef" and "not measured" in done.stdout
    assert done.stdout.splitlines()[-1] == "failed: train"
    done = run("everything")
    assert done.returncode == 2 and "part must be one of build, test, sanitize" in done.stderr


@pytest.mark.usefixtures("bare")
def test_every_part_of_the_script_runs_its_files(tmp_path):
    """With a python that only notes what it is asked; the parts that need a GPU at once are left out."""
    asked = tmp_path / "asked"
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\necho "$@" >>"{asked}"\n')
    stub.chmod(0o755)
    environment = os.environ | {"PYTHON": str(stub), "OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "work")}
    environment |= {"CIFAR": str(tmp_path)}
    parts = ["test", "optimizer", "adamw", "kernels", "compile", "step", "features", "train", "figure"]
    done = subprocess.run(["sh", BENCH / "gpu.sh", *parts], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = asked.read_text()
    files = ("bench_fused.py", "bench_kernels.py", "bench_training_step.py")
    for file in (*files, "tests/test_kernels.py"):
        assert file in lines, file
    compared = [line for line in lines.splitlines() if line.startswith("-m freezeout_ext compare ")]
    assert len(compared) == 9 and all(" --data cifar100 --model wrn-40-4 " in line for line in compared)
    assert [f"--seeds {1 + n % 3} " in line for n, line in enumerate(compared)] == [True] * 9
    assert done.stdout.count("all 3 seeds are done") == 3
    for rates, part in (("scale-lr", compared[3:6]), ("no-scale-lr", compared[6:])):
        assert all(f" --batch-size 50 --lr 0.1 --{rates} --how-scale linear cubic --t0 0.5 " in line for line in part)
    assert "-m freezeout_ext report " in lines
    suites = [line for line in lines.splitlines() if "--junitxml" in line]
    assert len(suites) == 3 and " -m cuda or native_cuda tests" in suites[0]
    assert lines.count("gpu_report.py") == len(parts)
