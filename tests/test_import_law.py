"""Who may import whom inside the package: read from the source, so that a lazy import counts too."""

import ast
import graphlib
from pathlib import Path

import pytest

import freezeout_ext

PACKAGE = Path(freezeout_ext.__file__).parent

# part -> parts it may import; a part is a module or a folder directly below the package.
LAW = {
    "arguments": set(),
    "schedule": {"arguments"},
    "native": set(),
    "source_order": set(),
    "structure": {"source_order"},
    "named": {"structure"},
    "text": set(),
    "layers": {"arguments", "named", "structure", "text"},
    "attach": set(),
    "cuda_graphs": set(),
    "kernels": {"cuda_graphs"},
    "fused": {"arguments", "native"},
    "torch_state": set(),
    "prefix": {"kernels", "native", "attach", "cuda_graphs", "torch_state"},
    "param_groups": {"arguments", "layers"},
    "memory": set(),
    "checks": {"arguments", "schedule", "layers", "attach", "param_groups"},
    "order": {"layers", "attach"},
    "transition": {"layers", "attach", "param_groups", "prefix", "checks", "memory"},
    "state": {"arguments", "schedule", "layers", "transition"},
    "readings": {"arguments", "layers", "memory", "order", "param_groups", "prefix", "schedule", "transition"},
    "freezeout": {
        "arguments", "checks", "layers", "order", "param_groups", "prefix", "readings", "schedule", "state",
        "transition",
    },
    "features": {"arguments", "attach", "torch_state"},
    "step_rates": {"freezeout", "fused", "native", "param_groups", "schedule"},
    "graphed": {"arguments", "attach", "batch", "cuda_graphs", "freezeout", "fused", "schedule", "step_rates"},
    "planner": {"arguments", "schedule", "layers", "fused", "batch", "text", "memory"},
    "integrations": {"arguments", "attach", "features", "freezeout"},
    "models": {"arguments"},
    "batch": set(),
    "tasks": {"arguments", "models", "batch", "torch_state"},
    "training": {
        "arguments", "batch", "features", "freezeout", "fused", "graphed", "integrations", "layers", "memory", "models",
        "native", "planner", "prefix", "schedule", "tasks", "text",
    },
    "__init__": {"schedule", "layers", "freezeout", "fused", "native", "graphed", "transition", "features"},
    "__main__": {"training"},
}  # fmt: skip
STANDARD_LIBRARY_ONLY = {"arguments", "schedule"}


def sources():
    return sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def targets(path: Path) -> list[list[str]]:
    """What the file imports anywhere: dotted names, split."""
    found = []
    folder = path.relative_to(PACKAGE.parent).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(folder[: len(folder) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            found += [[*base, alias.name] for alias in node.names]
    return found


def imports(path: Path) -> tuple[set[str], set[str]]:
    """-> (parts of this package, top names of other packages) that the file imports anywhere."""
    inside = {target[1] for target in targets(path) if target[0] == PACKAGE.name}
    return inside - {part_of(path)}, {target[0] for target in targets(path)} - {PACKAGE.name}


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


def test_the_law_allows_nothing_that_is_not_used():
    used = {part: set() for part in LAW}
    for path in sources():
        used[part_of(path)] |= imports(path)[0] - {"_C"}
    assert used == LAW


@pytest.mark.parametrize("package", sorted({path.parent for path in sources()} - {PACKAGE}), ids=lambda path: path.name)
def test_there_is_no_circle_inside_a_package(package):
    modules = {path.stem: path for path in package.glob("*.py") if path.stem != "__init__"}
    here = [PACKAGE.name, package.name]
    graph = {
        name: {target[2] for target in targets(path) if target[:2] == here}.intersection(modules) - {name}
        for name, path in modules.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them


def test_benchmarks_and_tests_do_not_import_each_other():
    tests = Path(__file__).parent
    bench = tests.parent / "bench"
    names = {folder: {path.stem for path in folder.rglob("*.py")} for folder in (tests, bench)}
    for folder, others in ((tests, names[bench]), (bench, names[tests])):
        for path in folder.rglob("*.py"):
            assert not {target[0] for target in targets(path)} & (others - names[folder]), path


def test_the_law_sees_lazy_and_relative_imports(tmp_path):
    assert imports(PACKAGE / "freezeout.py")[0] >= {"schedule", "layers"}
    assert "timm" in imports(PACKAGE / "named.py")[1]


def test_the_schedule_never_learns_the_word_tensor_nor_a_kernel_the_word_frozen():
    assert "tensor" not in (PACKAGE / "schedule.py").read_text().lower()
    for path in (PACKAGE / "kernels").glob("*.py"):
        assert "frozen" not in path.read_text().lower(), path
