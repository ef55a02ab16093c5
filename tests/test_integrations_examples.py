"""The examples and the code blocks of the docs run as they stand."""

import argparse
import re
import runpy
import shlex
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from timm_models import MISSING, importable_timm
from torch import nn
from torch.utils.data import TensorDataset

from freezeout_ext.training import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{i}")
    for page in sorted((ROOT / "docs").glob("*.md"))
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


def run(monkeypatch, name, *arguments):
    path = str(ROOT / "examples" / name)
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    return runpy.run_path(path)["main"]()


@pytest.mark.parametrize("accelerate", [False, True])
def test_plain_loop(monkeypatch, capsys, accelerate):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install freezeout_ext[train]")
    if accelerate:
        pytest.importorskip("accelerate", reason="Accelerate is not installed: pip install freezeout_ext[transformers]")
    accuracy = run(monkeypatch, "plain_loop.py", "--epochs", "3", *(["--accelerate"] if accelerate else []))
    printed = capsys.readouterr().out
    assert "froze stem" in printed and "froze blocks.2" in printed
    assert accuracy > 0.5  # chance is 0.1


def test_transformers_finetune(monkeypatch, capsys):
    pytest.importorskip("transformers", reason="Transformers is not installed: pip install freezeout_ext[transformers]")
    accuracy = run(monkeypatch, "transformers_finetune.py", "--epochs", "1")
    printed = capsys.readouterr().out
    assert "froze bert.embeddings" in printed and "6 of 7 layers frozen" in printed
    assert accuracy > 0.5  # chance


def test_kept_features_reads_no_picture_twice(monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install freezeout_ext[train]")
    assert run(monkeypatch, "kept_features.py", "--epochs", "8") > 0.4  # chance is 0.1
    printed = capsys.readouterr().out
    assert "outputs of" in printed and "samples not decoded" in printed


@pytest.mark.parametrize("name", ["plain_loop.py", "kept_features.py", "timm_finetune.py", "transformers_finetune.py"])
def test_an_example_fits_on_a_screen(name):
    assert len((ROOT / "examples" / name).read_text().splitlines()) < 80


def names_of_a_users_loop() -> dict:
    """What a block that shows a loop takes from the user's own script."""
    model = nn.Sequential(
        OrderedDict(
            stem=nn.Linear(8, 8), blocks=nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))), head=nn.Linear(8, 2)
        )
    )
    dataset = TensorDataset(torch.randn(256, 8), torch.randint(2, (256,)))
    return {"model": model, "dataset": dataset, "criterion": nn.CrossEntropyLoss(), "epochs": 8}


MY_TASK = """
from collections import OrderedDict
import torch
from torch import nn
from torch.utils.data import TensorDataset
from freezeout_ext.tasks import Task

def make_model():
    blocks = nn.Sequential(*(nn.Linear(8, 8) for _ in range(7)))
    return nn.Sequential(OrderedDict(stem=nn.Linear(8, 8), blocks=blocks, head=nn.Linear(8, 2)))

data = TensorDataset(torch.randn(64, 8), torch.randint(2, (64,)))
task = Task(make_model=make_model, train=data, evaluation=data, epochs=2, batch_size=16)
"""


@pytest.mark.parametrize("block", BLOCKS)
def test_a_code_block_of_the_docs_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_task.py").write_text(MY_TASK)
    for library in ("lightning", "transformers"):
        if f"integrations.{library}" in block:
            pytest.importorskip(library, reason=f"{library} is not installed: pip install freezeout_ext[{library}]")
    if "import timm" not in block:
        exec(compile(block, "docs", "exec"), names_of_a_users_loop())
    elif MISSING:
        pytest.skip(MISSING)
    else:
        with importable_timm():
            exec(compile(block, "docs", "exec"), {})


def test_the_code_of_the_readme_runs_from_top_to_bottom(capsys):
    names = names_of_a_users_loop()
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        exec(compile(block, "README", "exec"), names)
    assert names["freezeout"].num_frozen >= 5 and names["cache"].report().rows > 0
    assert "blocks.3" in capsys.readouterr().out


def shell_commands() -> set[str]:
    """What the pages show as a command: lines of blocks, and inline code."""
    found = set()
    for page in PAGES:
        text = page.read_text()
        blocks = "".join(re.findall(r"```\n(.*?)```", text, re.DOTALL)) + "\n".join(re.findall(r"^ {4}.*", text, re.M))
        found |= {line.split("  #")[0].strip() for line in blocks.splitlines()} | set(re.findall(r"`([^`\n]+)`", text))
    return found


COMMANDS = shell_commands()
# Of our command line, as they are typed: not the names of its parts, nor with places to fill in.
OURS = sorted(c for c in COMMANDS if re.match(r"freezeout +\w+ .*(--|\.py)", c) and "..." not in c)


@pytest.mark.parametrize("command", OURS)
def test_a_command_of_the_docs_is_understood(command):
    cli._parser().parse_args(shlex.split(command)[1:])


def test_the_options_that_stand_for_the_authors_are_ours():
    parts = next(a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)).choices.values()
    known = {option for part in parts for action in part._actions for option in action.option_strings}
    rows = [line.split("|") for line in (ROOT / "docs" / "options.md").read_text().splitlines() if line.startswith("|")]
    named = {option for row in rows for option in re.findall(r"`(--[a-z0-9-]+)", row[2])}
    assert len(named) > 10 and named <= known, named - known


def test_the_scripts_and_targets_of_the_docs_are_there():
    """`make NAME`, `sh FILE`, `python FILE`, `pytest FILE`; and every file or folder that a link names."""
    makefile = (ROOT / "Makefile").read_text()
    seen = 0
    for command in COMMANDS:
        if target := re.fullmatch(r"make ([a-z]+)", command):
            assert re.search(rf"^{target[1]}:", makefile, re.M), command
            seen += 1
        elif file := re.match(r"(?:sh|bash|python|pytest) ([\w./-]+\.(?:py|sh))", command):
            assert (ROOT / file[1]).exists() or "NAME" in file[1], command
            seen += 1
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"
            seen += 1
    assert seen > 30


def test_the_docs_have_code_and_commands():
    assert len(BLOCKS) >= 10 and len(OURS) >= 8
