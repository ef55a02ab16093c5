"""Who may import whom inside the package: read from the source, so that a lazy import counts too."""

import ast
from pathlib import Path

import pytest

import freezeout_ext

PACKAGE = Path(freezeout_ext.__file__).parent

# part -> parts it may import; a part is a module or a folder directly below the package.
LAW = {
    "schedule": set(),
    "native": set(),
    "layers": set(),
    "attach": set(),
    "cuda_graphs": set(),
    "kernels": {"cuda_graphs"},
    "fused": {"native"},
    "prefix": {"kernels", "native", "attach", "cuda_graphs"},
    "param_groups": {"layers"},
    "memory": set(),
    "checks": {"schedule", "layers", "attach", "param_groups"},
    "transition": {"layers", "attach", "param_groups", "prefix", "checks", "memory"},
    "state": {"schedule", "layers", "transition"},
    "freezeout": {"schedule", "layers", "prefix", "param_groups", "checks", "memory", "transition", "state"},
    "features": set(),
    "graphed": {"freezeout", "schedule", "param_groups", "fused", "native", "attach", "cuda_graphs"},
    "planner": {"freezeout", "schedule", "layers", "fused"},
    "integrations": {"freezeout", "schedule", "layers", "prefix", "fused", "attach"},
    "models": set(),
    "training": {
        "schedule", "layers", "kernels", "fused", "prefix", "freezeout", "graphed", "planner", "integrations",
        "models", "native",
    },
    "__init__": {"schedule", "layers", "freezeout", "fused", "native", "prefix", "graphed", "transition", "features"},
    "__main__": {"training"},
}  # fmt: skip
STANDARD_LIBRARY_ONLY = {"schedule"}


def sources():
    return sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path):
    """-> (parts of this package, top names of other packages) that the file imports anywhere."""
    inside, outside = set(), set()
    folder = ("freezeout_ext", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(folder[: len(folder) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            targets = [[*base, alias.name] for alias in node.names]
        for target in targets:
            if target[0] == "freezeout_ext":
                inside.add(target[1])
            else:
                outside.add(target[0])
    return inside - {part_of(path)}, outside


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_part_imports_only_what_it_may(path):
    part = part_of(path)
    assert part in LAW, f"{part} is new: say in LAW what it may import"
    inside, outside = imports(path)
    # The compiled module and the package's own name are reached through `native`.
    allowed = LAW[part] | ({"_C"} if part == "native" else set())
    assert inside <= allowed
    if part in STANDARD_LIBRARY_ONLY:
        assert "torch" not in outside


def test_the_law_sees_lazy_and_relative_imports(tmp_path):
    assert imports(PACKAGE / "freezeout.py")[0] >= {"schedule", "layers"}
    assert "timm" in imports(PACKAGE / "layers.py")[1]


def test_the_schedule_never_learns_the_word_tensor_nor_a_kernel_the_word_frozen():
    assert "tensor" not in (PACKAGE / "schedule.py").read_text().lower()
    for path in (PACKAGE / "kernels").glob("*.py"):
        assert "frozen" not in path.read_text().lower(), path
