"""The examples and the code blocks of the docs run as they stand."""

import re
import runpy
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("block", BLOCKS)
def test_a_code_block_of_the_docs_runs(block):
    for library in ("lightning", "transformers"):
        if f"integrations.{library}" in block:
            pytest.importorskip(library, reason=f"{library} is not installed: pip install freezeout_ext[{library}]")
    exec(compile(block, "docs", "exec"), {})


def test_the_docs_have_code():
    assert len(BLOCKS) >= 4
