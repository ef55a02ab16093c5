"""load_task: what a user's file may hold, and one sentence with its line for each way in which it can be wrong."""

import subprocess
import sys
import textwrap

import pytest
import torch

from freezeout_ext.tasks import Task, TaskFault, batches, faults_of, load_task

HEAD = """\
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset, TensorDataset
from freezeout_ext.tasks import Metric, Task, mean_of, rmse
data = TensorDataset(torch.randn(6, 4), torch.tensor([0, 1, 2] * 2))
values = TensorDataset(torch.randn(6, 4), torch.randn(6))
net = lambda: nn.Linear(4, 3)
"""
GOOD = "task = Task(make_model=net, train=data, evaluation=data)\n"
LINE = len(HEAD.splitlines()) + 1


def write(folder, body, head=HEAD):
    path = folder / "my_task.py"
    path.write_text(head + textwrap.dedent(body))
    return path


def test_a_task_and_a_function_that_returns_one(tmp_path):
    path = write(
        tmp_path, GOOD + "def other():\n    return Task(make_model=net, train=data, evaluation=data, epochs=3)\n"
    )
    task, other = load_task(str(path)), load_task(f"{path}:other")
    assert isinstance(task, Task) and (task.name, task.epochs) == ("my_task.py", 10)
    assert (other.name, other.epochs, other.file) == ("my_task.py:other", 3, path)
    assert task.metric_name == "accuracy" and task.higher_is_better


def test_the_only_task_needs_no_name(tmp_path):
    assert load_task(str(write(tmp_path, GOOD.replace("task =", "flowers =")))).name == "my_task.py:flowers"


def test_the_file_finds_its_neighbours_and_hides_no_package(tmp_path):
    (tmp_path / "my_neighbour.py").write_text("width = 4\n")
    path = tmp_path / "torch.py"
    path.write_text(HEAD + "import my_neighbour\nassert my_neighbour.width == 4\n" + GOOD)
    load_task(str(path))
    assert sys.modules["torch"] is torch


def test_the_fingerprint_is_that_of_the_code(tmp_path):
    first = load_task(str(write(tmp_path, GOOD))).fingerprint
    assert load_task(str(write(tmp_path, "# a comment\n" + GOOD))).fingerprint == first
    assert (
        load_task(str(write(tmp_path, GOOD.replace("evaluation=data", "evaluation=data, epochs=9")))).fingerprint
        != first
    )


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("x = = 1\n", f"my_task.py, line {LINE}: SyntaxError: invalid syntax"),
        ("import no_such_package\n", f"my_task.py, line {LINE}: ModuleNotFoundError: No module named 'no_such"),
        ("x = 1 / 0\n", f"my_task.py, line {LINE}: ZeroDivisionError: division by zero"),
        ("raise SystemExit\n", f"my_task.py, line {LINE}: the file must define a task and not exit"),
        ("", "my_task.py must define task, a Task or a function that returns one"),
        (GOOD.replace("task =", "a =") + GOOD.replace("task =", "b ="),
         "my_task.py holds 2 tasks, name one: my_task.py:a, my_task.py:b"),
        ("task = 3\n", f"my_task.py, line {LINE}: task must be a Task, got a int"),
        ("\ndef task():\n    return 3\n", f"my_task.py, line {LINE + 1}: task() must return a Task, got a int"),
        ("class task(Task): pass\n", f"my_task.py, line {LINE}: task must be a Task, got a type"),
        ("task = Task(make_model=net, train=data)\n",
         f"my_task.py, line {LINE}: TypeError: Task.__init__() missing 1 required keyword-only argument: 'evaluation'"),
        ("task = Task(make_model=net(), train=data, evaluation=data, epochs='3')\n",
         f"my_task.py, line {LINE}: TypeError: epochs must be a whole number, got '3'"),
        ("task = Task(make_model=net, train=data, evaluation=data, batch_size=0)\n",
         f"my_task.py, line {LINE}: ValueError: batch_size must be >= 1, got 0"),
        ("task = Task(make_model=net, train=TensorDataset(torch.ones(0, 4)), evaluation=data)\n",
         f"my_task.py, line {LINE}: ValueError: train must hold at least one sample, got none"),
        ("class D(IterableDataset):\n    def __iter__(self):\n        return iter(data)\n"
         "task = Task(make_model=net, train=D(), evaluation=data)\n",
         f"my_task.py, line {LINE + 3}: TypeError: train must be a map-style dataset, with __len__ and __getitem__"),
        ("task = Task(make_model=net, train=data, evaluation=data, metric=F.l1_loss)\n",
         f"my_task.py, line {LINE}: TypeError: metric must be a Metric, such as mean_of"),
        ("task = Task(make_model=lambda: 3, train=data, evaluation=data)\n",
         f"my_task.py, line {LINE}: make_model must return an nn.Module, got a int"),
        ("def make():\n    return nn.Linear(3 / 2, 1)\ntask = Task(make_model=make, train=data, evaluation=data)\n",
         f"my_task.py, line {LINE + 1}: make_model must make a model: TypeError"),
        ("task = Task(make_model=lambda: nn.ReLU(), train=data, evaluation=data)\n",
         "make_model's model must have a parameter that trains"),
        ("task = Task(make_model=lambda: nn.Linear(5, 3), train=data, evaluation=data)\n",
         "the model must take the inputs, a tensor [2, 4] of float32: RuntimeError: mat1 and mat2 shapes"),
        ("task = Task(make_model=net, train=values, evaluation=values)\n",
         "targets must be class numbers, got a tensor [2] of float32: give the task a criterion for them"),
        ("task = Task(make_model=lambda: nn.Linear(4, 1), train=values, evaluation=values, criterion=F.mse_loss)\n",
         "a tensor [2, 1] of float32 and a tensor [2] of float32: UserWarning: Using a target size"),
        ("def loss(outputs, targets):\n    return F.cross_entropy(outputs, targets, reduction='none')\n"
         "task = Task(make_model=net, train=data, evaluation=data, criterion=loss)\n",
         f"my_task.py, line {LINE}: criterion must return a tensor without dimensions, got a tensor [2] of float32"),
        ("def loss(outputs, targets):\n    return outputs.argmax().float()\n"
         "task = Task(make_model=net, train=data, evaluation=data, criterion=loss)\n",
         f"my_task.py, line {LINE}: criterion's loss must depend on the model's parameters"),
        ("def loss(outputs, targets):\n    return outputs.sum() / 0\n"
         "task = Task(make_model=net, train=data, evaluation=data, criterion=loss)\n",
         f"my_task.py, line {LINE}: criterion must return a finite loss, got "),
        ("def loss(outputs, targets):\n    return outputs[7].sum()\n"
         "task = Task(make_model=net, train=data, evaluation=data, criterion=loss)\n",
         f"my_task.py, line {LINE + 1}: criterion must take outputs and targets, a tensor [2, 3] of float32 and"),
        ("three = TensorDataset(torch.ones(6, 4), torch.ones(6, 4), torch.zeros(6).long())\n"
         "task = Task(make_model=net, train=three, evaluation=data)\n",
         'train must give pairs (inputs, targets): TypeError: a batch must be a pair (inputs, targets) or a dict'),
        ("task = Task(make_model=net, train=data, evaluation=data, metric=rmse())\n",
         "metric must take outputs and targets, a tensor [2, 3] of float32 and a tensor [2] of int64: Value"),
        ("task = Task(make_model=net, train=data, evaluation=data, make_optimizer=lambda p: list(p))\n",
         f"my_task.py, line {LINE}: make_optimizer must return a torch optimizer, got a list of 2"),
        ("class Data:\n    def __len__(self):\n        return 5\n    def __getitem__(self, i):\n        return [][i]\n"
         "task = Task(make_model=net, train=data, evaluation=Data())\n",
         f"my_task.py, line {LINE + 4}: evaluation must give samples: IndexError: list index out of range"),
        ("other = TensorDataset(torch.ones(6, 4), torch.full((6,), 7))\n"
         "task = Task(make_model=net, train=data, evaluation=other)\n",
         "the model and the criterion must take evaluation: IndexError: Target 7 is out of bounds"),
        ("other = TensorDataset(torch.ones(6, 4) / 0, torch.zeros(6).long())\n"
         "task = Task(make_model=net, train=data, evaluation=data, validation=other)\n",
         "validation must give a finite loss, got nan"),
    ],
)  # fmt: skip
def test_a_fault_is_one_sentence_with_its_line(tmp_path, body, sentence):
    path = write(tmp_path, body)
    with pytest.raises(TaskFault) as caught:
        load_task(str(path))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_name(tmp_path):
    with pytest.raises(TaskFault, match=r"task must be a Python file, .*, .*none\.py is none"):
        load_task(str(tmp_path / "none.py"))
    (tmp_path / "notes.txt").write_text(GOOD)
    with pytest.raises(TaskFault, match=r"task must be a Python file, .*, .*notes\.txt:task is none"):
        load_task(f"{tmp_path / 'notes.txt'}:task")
    path = write(tmp_path, GOOD)
    with pytest.raises(TaskFault, match=r"must define flowers, .*; it holds my_task.py:task"):
        load_task(f"{path}:flowers")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(TaskFault, match=r"my_task\.py must be a Python file in UTF-8"):
        load_task(str(path))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_fails_in_a_run_names_its_line(tmp_path, workers):
    body = """\
        class Data:
            def __len__(self):
                return 5
            def __getitem__(self, i):
                if i == 4:
                    raise OSError("photo_4.jpg is broken")
                return torch.ones(4), 0
        task = Task(make_model=net, train=Data(), evaluation=data)
    """
    task = load_task(str(write(tmp_path, body)))
    sentence = rf"my_task.py, line {LINE + 5}: OSError: photo_4.jpg is broken"
    with pytest.raises(TaskFault, match=sentence), faults_of(task.file):
        list(batches(task.train, 2, workers=workers))


def test_two_files_of_one_name_do_not_mix(tmp_path):
    for name, epochs in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, GOOD.replace("evaluation=data", f"evaluation=data, epochs={epochs}"))
    assert [load_task(str(tmp_path / name / "my_task.py")).epochs for name in "aba"] == [1, 2, 1]


def test_loading_needs_no_optional_package(tmp_path):
    code = """
        import sys
        for name in ("timm", "transformers", "PIL", "safetensors", "sklearn", "efficientnet_lite_pytorch"):
            sys.modules[name] = None
        from freezeout_ext.tasks import load_task
        print(load_task("my_task.py").name)
    """
    write(tmp_path, GOOD)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "my_task.py\n"
