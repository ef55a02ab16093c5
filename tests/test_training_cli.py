"""The command line: what it makes, and that bad input gives one sentence, status 2 and nothing on disk."""

import os
import struct
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

from freezeout_ext import Schedule
from freezeout_ext.training import cli, commands, plot
from freezeout_ext.training.config import BadInput, TrainConfig
from freezeout_ext.training.run_folder import RunFolder, read_json, write_atomically

TINY = ["--model", "wrn-10-1", "--steps", "4", "--batch-size", "8", "--threads", "1", "--device", "cpu"]


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    assert cli.main(["train", *TINY, "--t0", "0.5", "--out", str(out)]) == 0
    return out


def test_train_writes_a_run_and_says_so(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", *TINY, "--t0", "0.5", "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "froze stem" in shown.out and "epoch 1/1" in shown.out and "after 4 steps" in shown.out
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "costs.json",
        "log.jsonl",
        "result.json",
    ]


def test_every_flag_reaches_the_config(tmp_path):
    flags = (
        "--data digits --val-fraction 0.25 --model wrn-10-1 --no-anneal --steps 2 --batch-size 4 --optimizer sgd"
        " --lr 0.05 --momentum 0.8 --weight-decay 0.001 --warmup-steps 1 --t0 0.9 --how-scale 1.5 --no-scale-lr"
        " --max-transitions 2 --no-augment --amp bf16 --no-channels-last --device cpu --deterministic"
        " --threads 1 --seed 3"
    )
    assert cli.main(["train", *flags.split(), "--out", str(tmp_path / "run")]) == 0
    torch.use_deterministic_algorithms(False)
    config = RunFolder(tmp_path / "run").load_config()
    assert config == TrainConfig(
        data="digits",
        val_fraction=0.25,
        model="wrn-10-1",
        method="no-anneal",
        steps=2,
        batch_size=4,
        optimizer="sgd",
        lr=0.05,
        momentum=0.8,
        weight_decay=0.001,
        warmup_steps=1,
        t_0=0.9,
        how_scale=1.5,
        scale_lr=False,
        max_transitions=2,
        augment=False,
        amp="bf16",
        channels_last=False,
        device="cpu",
        deterministic=True,
        threads=1,
        seed=3,
    )
    unset = {
        field.name for field in fields(config) if getattr(config, field.name) == getattr(TrainConfig(), field.name)
    }
    assert unset == {
        "data", "image_size", "weights", "fingerprint", "epochs", "warmup_epochs", "start_frozen", "thaw_to", "cache",
        "views", "cache_dtype", "prefix", "graph", "compile",
    }  # fmt: skip


def test_defaults_are_resolved():
    config = TrainConfig(device="cpu").resolved()
    assert (config.lr, config.amp, config.channels_last, config.scale_lr) == (0.1, "off", True, True)
    config = TrainConfig(device="cpu", optimizer="adamw").resolved()
    assert (config.lr, config.scale_lr) == (0.001, False)
    assert TrainConfig().resolved().device == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--model wrn-11-1", "model 'wrn-11-1'"),
        ("--model nonesuch", "model must be one of"),
        ("--data imagenet", "argument --data: invalid choice: 'imagenet'"),
        ("--data cifar10", "data_dir"),
        ("--data cifar10 --data-dir {tmp}/nowhere", "cifar-10-batches-py"),
        ("--t0 0", "t_0 must be in (0, 1], got 0.0"),
        ("--views 2", "views is of kept features, and none are kept: pass --cache too"),
        ("--how-scale quartic", "how_scale must be one of linear, squared, cubic or a positive power, got 'quartic'"),
        ("--lr -0.1", "lr must be >= 0, got -0.1"),
        ("--lr fast", "argument --lr: invalid float value: 'fast'"),
        ("--epochs 0", "epochs must be >= 1, got 0"),
        ("--epochs 1 --steps 1", "argument --steps: not allowed with argument --epochs"),
        ("--val-fraction 1", "val_fraction must be in [0, 1), got 1.0"),
        ("--t0 0.5 --epochs 1 --warmup-epochs 0.5", "warmup_steps must end before"),
        ("--out {tmp}/file/run", "out must be"),
        ("--out {tmp}/file", "out must be a folder"),
        ("--out {tmp}/full", "out must be a new or an empty folder"),
        ("--resume {tmp}/nowhere", "resume must name the folder of a run"),
        ("--resume {tmp}/full", "resume must name the folder of a run"),
        ("--resume {tmp}/full --out {tmp}/nowhere", "must name the same folder"),
        ("--model wrn-10-100000000", "model must fit into memory"),
        ("--model wrn-10-20000", "model must fit into memory"),
        ("--model wrn-99999994-1", "model must have a depth <= 10000"),
        ("--threads 100000000", "threads must be <= 1024"),
        ("--optimizer task", "--optimizer: invalid choice: 'task'"),
        ("--out=", "argument --out: must name a file or folder, got ''"),
        ("--optimizer lamb", "argument --optimizer: invalid choice: 'lamb'"),
        ("--fast", "unrecognized arguments: --fast"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(flags, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    before = sorted(tmp_path.rglob("*"))
    flags = flags.replace("{tmp}", str(tmp_path)).split()
    try:
        status = cli.main(["train", "--model", "wrn-10-1", "--device", "cpu", *flags])
    except SystemExit as exit:  # argparse's own
        status = exit.code
    shown = capsys.readouterr()
    assert status == 2
    assert sentence in shown.err and len(shown.err.splitlines()) == 1
    assert shown.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_cuda_where_there_is_none(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["train", "--device", "cuda", "--out", str(tmp_path / "run")]) == 2
    assert "device must be cpu or auto here, got cuda" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_corrupt_cifar_is_one_sentence(tmp_path, capsys):
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (
        "data_batch_1",
        "data_batch_2",
        "data_batch_3",
        "data_batch_4",
        "data_batch_5",
        "test_batch",
        "batches.meta",
    ):
        (folder / name).write_bytes(b"no pickle")
    flags = ["--data", "cifar10", "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    assert cli.main(["train", *flags]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_not_overwritten(trained, capsys):
    before = {path: path.read_bytes() for path in trained.iterdir()}
    assert cli.main(["train", *TINY, "--out", str(trained)]) == 2
    assert "continue it with --resume" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in trained.iterdir()} == before


def test_resume_takes_the_runs_own_config_and_refuses_another(trained, capsys):
    assert cli.main(["train", "--resume", str(trained)]) == 0
    assert cli.main(["train", "--out", str(trained), "--resume", "--t0", "0.5"]) == 0
    assert "after 4 steps" in capsys.readouterr().out
    assert cli.main(["train", "--resume", str(trained), "--lr", "0.3", "--t0", "0.8"]) == 2
    assert capsys.readouterr().err.endswith("is another one: lr is 0.1 there, 0.3 here; t_0 is 0.5 there, 0.8 here\n")


def test_resume_starts_where_there_is_no_run_yet(tmp_path):
    assert cli.main(["train", *TINY, "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert len(RunFolder(tmp_path / "run").read_log()) == 1


def test_no_freezeout_freezes_nothing(tmp_path, capsys):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install freezeout_ext[tensorboard]")
    assert cli.main(["train", *TINY, "--no-freezeout", "--tensorboard", "--out", str(tmp_path / "run")]) == 0
    assert ": froze " not in capsys.readouterr().out
    assert RunFolder(tmp_path / "run").load_result()["transitions"] == []
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_divergence_is_status_1(tmp_path, capsys):
    assert cli.main(["train", *TINY, "--lr", "1e9", "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err.startswith("freezeout: the loss became ")


def test_compare_end_to_end(tmp_path, capsys):
    out = tmp_path / "compare"
    flags = [*TINY, "--seeds", "2", "--t0", "0.5", "0.8", "--t0", "0.9", "--how-scale", "linear", "--out", str(out)]
    flags += ["--arms", "full", "freezeout"]
    assert cli.main(["compare", *flags]) == 0
    shown = capsys.readouterr().out
    for name in ("full", "freezeout linear 0.5", "freezeout linear 0.8", "freezeout linear 0.9"):
        assert f"{name}, seed 1: " in shown and f"\n{name} " in shown
    assert sorted(path.name for path in out.iterdir()) == [
        "compare.json",
        "compare.png",
        "costs.json",
        "report.html",
        "runs",
    ]
    assert png_size(out / "compare.png") == (1050, 1380)
    summary = read_json(out / "compare.json")
    by_cost = plot.plot_comparison(out, summary).axes[1]
    (strategy,) = [line for line in by_cost.lines if len(line.get_xdata()) == 3]
    accuracies = [100 * arm["test_accuracy"]["mean"] for arm in summary["arms"][1:]]
    assert sorted(strategy.get_ydata()) == sorted(accuracies)
    (out / "compare.png").unlink()
    assert cli.main(["plot", str(out)]) == 0
    assert png_size(out / "compare.png") == (1050, 1380)
    assert cli.main(["compare", *flags]) == 2
    assert "out must be a new or an empty folder" in capsys.readouterr().err
    assert cli.main(["compare", *flags, "--resume"]) == 0


@pytest.mark.parametrize(
    ("flags", "kinds"),
    [
        ("", {"full", "freezeout", "no-anneal", "cached", "short"}),
        ("--const-time", {"full", "freezeout", "no-anneal", "cached", "short", "const-time"}),
        ("--const-time --arms full freezeout", {"full", "freezeout", "const-time"}),
        ("--arms const-time", {"full", "freezeout", "const-time"}),
    ],
)
def test_arms_of_compare(flags, kinds, tmp_path, monkeypatch):
    asked = []

    class NoComparison:
        def __init__(self, base, out, *, arms, **options):
            asked.extend(arms)
            raise BadInput("enough")

    monkeypatch.setattr(commands, "Comparison", NoComparison)
    assert cli.main(["compare", *TINY, *flags.split(), "--out", str(tmp_path)]) == 2
    assert {arm.kind for arm in asked} == kinds


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--seeds 0", "seeds must be >= 1, got 0"),
        ("--seed 3", "unrecognized arguments: --seed"),
        ("--shorter 1.5", "shorter must be parts in (0, 1), got 1.5"),
        ("--arms half", "argument --arms: invalid choice: 'half'"),
        ("--t0 0.5 2", "t_0 must be in (0, 1], got 2.0"),
        ("--model nonesuch", "model must be one of"),
        ("--out {tmp}/file/compare", "out must be"),
    ],
)
def test_compare_with_bad_input(flags, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    try:
        status = cli.main(["compare", *TINY, *flags.replace("{tmp}", str(tmp_path)).split()])
    except SystemExit as exit:
        status = exit.code
    shown = capsys.readouterr()
    assert status == 2 and sentence in shown.err and len(shown.err.splitlines()) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


def test_plot_draws_runs_and_schedules(trained, tmp_path, capsys):
    assert cli.main(["plot", str(trained)]) == 0
    assert png_size(trained / "curves.png") == (1200, 1575)
    (trained / "curves.png").unlink()
    flags = ["plot", "--t0", "0.5", "0.8", "--how-scale", "linear", "cubic", "--model", "wrn-10-1", "--steps", "100"]
    assert cli.main([*flags, "--out", str(tmp_path / "new" / "figure.png")]) == 0
    assert png_size(tmp_path / "new" / "figure.png") == (1200, 4 * 480)
    assert cli.main(["plot", str(tmp_path / "nowhere")]) == 2
    assert "run must be the folder of a run" in capsys.readouterr().err
    assert cli.main(["plot", "--t0", "7", "--out", str(tmp_path / "bad.png")]) == 2
    assert not (tmp_path / "bad.png").exists()


def test_schedule_chart_holds_the_learning_rates():
    schedule = Schedule(4, 100, t_0=0.5, how_scale="linear")
    ax = plot.plot_schedules({"title": schedule}, base_lr=0.2).axes[0]
    assert len(ax.lines) == 4
    for i, line in enumerate(ax.lines):
        steps, rates = line.get_data()
        assert (steps[0], steps[-1]) == (0, schedule.milestone(i))
        assert list(rates) == [0.2 * schedule.lr_factor(i, step) for step in steps]


def test_comparison_chart_holds_means_and_transitions():
    def rows(seconds, accuracies, frozen_at):
        return [
            {
                "step": 10 * k,
                "train_seconds": s,
                "test_accuracy": a,
                "transitions": [{"step": step} for step in frozen_at if 10 * k - 10 < step <= 10 * k],
            }
            for k, (s, a) in enumerate(zip(seconds, accuracies, strict=True), 1)
        ]

    runs = [rows([1, 2, 3], [0.5, 0.7, 0.9], [5, 15]), rows([3, 4, 5], [0.7, 0.9, 1.0], [5, 15])]
    _, (ax,) = plot.empty_figure(1, height=4)
    plot.draw_over_time(ax, {"freezeout cubic 0.5": runs, "short cubic 0.5": runs})
    curve, end, ticks, short, *_ = ax.lines
    assert curve.get_xdata().tolist() == [2, 3, 4]
    assert curve.get_ydata().tolist() == pytest.approx([60, 80, 95], rel=1e-12)
    # Between two epochs a freeze is marked where it was; in the first one at its end.
    assert (end.get_xdata().tolist(), list(ticks.get_xdata())) == ([4], [2, 2.5])
    assert list(ticks.get_ydata()) == pytest.approx([60, 70], rel=1e-12)
    assert curve.get_color() == short.get_color() and curve.get_linestyle() != short.get_linestyle()


def test_plot_without_matplotlib_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["plot", "--out", str(tmp_path / "figure.png")]) == 2
    assert capsys.readouterr().err == "freezeout: charts need matplotlib: pip install 'freezeout_ext[train]'\n"


def test_module_runs_as_a_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "freezeout_ext", "train", *TINY, "--lr", "-1", "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "freezeout: lr must be >= 0, got -1.0\n")


def test_a_reader_that_has_enough_is_no_error():
    program = [sys.executable, "-m", "freezeout_ext", "plan", "--no-measure", "--model", "wrn-10-1"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ}) as running:
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 141


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("plot --layers 100000000", "layers must be <= 10000, got 100000000"),
        ("plot --lr nan", "lr must be >= 0, got nan"),
        ("plot --lr inf", "lr must be >= 0, got inf"),
        ("plot --lr -1", "lr must be >= 0, got -1.0"),
        ("plot --out {tmp}", "--out must name a file, got the folder"),
        ("plan --no-measure --rounds 0", "rounds must be >= 1, got 0"),
        ("plan --no-measure --max-seconds nan", "max_seconds must be >= 0, got nan"),
        ("plan --no-measure --json {tmp}", "--json must name a file, got the folder"),
        ("plan --no-measure --png {tmp}", "--png must name a file, got the folder"),
        ("report {tmp} --out {tmp}", "--out must name a file, got the folder"),
    ],
)
def test_bad_input_of_the_other_commands(flags, sentence, tmp_path, capsys):
    assert cli.main(flags.replace("{tmp}", str(tmp_path)).split()) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err and len(shown.err.splitlines()) == 1 and shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_device_or_pipe_is_never_replaced_by_a_file_and_a_link_stays_a_link(tmp_path, capsys):
    pipe, link, file = tmp_path / "pipe", tmp_path / "link.png", tmp_path / "file.png"
    os.mkfifo(pipe)
    assert cli.main(["plot", "--out", str(pipe)]) == 2
    assert f"--out must name a file, got {pipe}, which is a device or a pipe" in capsys.readouterr().err
    with pytest.raises(ValueError, match="device or a pipe"):
        write_atomically(pipe, lambda file: file.write(b"new"))
    link.symlink_to(file)
    assert cli.main(["plot", "--out", str(link)]) == 0
    assert link.is_symlink() and file.is_file() and sorted(tmp_path.iterdir()) == [file, link, pipe]


def test_stdout_that_is_closed_or_full_is_no_traceback(tmp_path):
    command = [sys.executable, "-m", "freezeout_ext", "plan", "--no-measure", "--model", "wrn-10-1"]
    closed = subprocess.run(command, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: os.close(1))
    assert (closed.returncode, closed.stderr) == (0, "")
    with open("/dev/full", "w") as full:
        filled = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert filled.returncode == 2 and len(filled.stderr.splitlines()) == 1
    assert "No space left on device" in filled.stderr
