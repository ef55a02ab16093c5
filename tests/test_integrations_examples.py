"""The examples and the code blocks of the docs run as they stand."""

import re
import runpy
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from timm_models import MISSING, importable_timm
from torch import nn
from torch.utils.data import TensorDataset

ROOT = Path(__file__).parent.parent
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


@pytest.mark.parametrize("name", ["plain_loop.py", "timm_finetune.py", "transformers_finetune.py"])
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
    return {"model": model, "dataset": dataset, "criterion": nn.CrossEntropyLoss(), "epochs": 2}


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


def test_the_first_screen_of_the_readme_runs():
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    names = names_of_a_users_loop()
    exec(compile(block, "README", "exec"), names)
    assert names["freezeout"].num_frozen >= 5 and names["cache"].report().rows > 0


def test_the_docs_have_code():
    assert len(BLOCKS) >= 4
