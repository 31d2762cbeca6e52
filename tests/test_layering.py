"""Imports inside qatkit go one way only, and the core imports nothing but torch and numpy."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "qatkit"

# A module may import what stands on its own line or above it.
LAYERS = (
    ("version", "errors", "files", "copying", "progress", "spec", "config", "backend"),
    ("functional", "kernels"),
    ("observers",),
    ("ranks", "recompute", "plain_numbers", "once"),
    ("quantizer", "learned_quantizer"),
    ("nn", "modes"),
    ("graph",),
    (
        "synchronize",
        "prepare",
        "batches",
        "calibration_report",
        "calibrate",
        "collecting",
        "sharding",
        "running",
        "freeze",
        "accumulation",
        "summary",
        "checkpoint",
        "data",
    ),
    ("tables",),
    ("training",),
    ("ptq", "analysis", "export", "integer"),
    ("compat", "cli"),
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}

# What may be imported together with qatkit; anything else (onnx, torchvision, tqdm ...) is imported
# inside the function that needs it.
CORE = sys.stdlib_module_names | {"torch", "numpy", "qatkit"}

# These may import a compiler; in return nothing may import them before they are needed.
COMPILERS = {"qatkit.kernels.gpu": "triton", "qatkit.kernels.cpu.loops": "numba"}


@dataclass(frozen=True)
class Import:
    """One import of ``target``, a dotted name, by the module ``source``, a dotted name too."""

    source: str
    line: int
    target: str
    lazy: bool

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def walk(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Yield each import statement and whether it runs later than the import of its module."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, lazy
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.body:
                yield from walk(ast.Module([statement], []), lazy=True)
            for statement in child.orelse:
                yield from walk(ast.Module([statement], []), lazy)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, lazy or inside)


def modules(root: Path) -> dict[str, Path]:
    """Return the file of each module of the package at ``root`` by its dotted name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = (root.name, *path.relative_to(root).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path) -> list[Import]:
    """Return every import of the package at ``root``, relative ones made absolute."""
    found = []
    files = modules(root)
    for source, path in files.items():
        for node, lazy in walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                base = node.module or ""
                if node.level:
                    package = (
                        source.split(".") if path.name == "__init__.py" else source.split(".")[:-1]
                    )
                    kept = package[: len(package) - node.level + 1]
                    base = ".".join([*kept, *([node.module] if node.module else [])])
                # `from package import name` depends on the module of that name, if there is one
                targets = [
                    f"{base}.{a.name}" if f"{base}.{a.name}" in files else base for a in node.names
                ]
            found += [Import(source, node.lineno, target, lazy) for target in targets]
    return found


def part(module: str) -> str:
    """Return the part of the package that a module belongs to: `nn` for `qatkit.nn.conv`."""
    return [*module.split("."), ""][1]


def _compiled_part(module: str) -> str:
    """Return the part of `COMPILERS` that a module belongs to, or nothing."""
    return next((name for name in COMPILERS if f"{module}.".startswith(f"{name}.")), "")


def violations(root: Path) -> list[str]:
    """Return one line for each broken rule of the package at ``root``."""
    remedy = f"give it a place in LAYERS of {Path(__file__).name}"
    parts = {module: part(module) for module in modules(root)}
    broken = [
        f"{module} is in no layer: {remedy}"
        for module, name in parts.items()
        if name and name not in LEVELS
    ]
    graph: dict[str, set[str]] = {}
    for each in imports(root):
        top = each.target.split(".")[0]
        home, goal = _compiled_part(each.source), _compiled_part(each.target)
        foreign = top not in CORE and COMPILERS.get(home) != top
        if not each.lazy and (foreign or (goal and goal != home)):
            broken.append(f"{each} at import time: import it inside the function that uses it")
        if top != root.name or each.source == root.name:
            continue
        if not part(each.target):
            broken.append(f"{each}: the package itself imports everything, import the module")
            continue
        source, target = (LEVELS.get(part(name), -1) for name in (each.source, each.target))
        if source >= 0 and target > source:
            broken.append(f"{each}, which is in a higher layer")
        if each.target != each.source:
            graph.setdefault(each.source, set()).add(each.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        broken.append(f"cycle: {' -> '.join(reversed(error.args[1]))}")
    return broken


def test_qatkit_keeps_its_layers() -> None:
    assert imports(ROOT), "found no imports: is the path right?"
    assert not violations(ROOT), "\n" + "\n".join(violations(ROOT))


GOOD = {
    "__init__.py": "from qatkit.cli import main\nfrom . import spec",
    "errors.py": "import torch",
    "spec.py": "from qatkit.errors import QatkitError",
    "nn/__init__.py": "from qatkit.nn.conv import Conv",
    "nn/conv.py": "from ..spec import QuantSpec\nfrom qatkit import errors",
    "kernels/gpu/__init__.py": "from qatkit.kernels.gpu.grid import f",
    "kernels/gpu/grid.py": "import triton",
    "cli.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import onnx\n"
    "def main():\n    import onnxruntime\n    from qatkit.nn import Conv",
}
IF_TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "
# case: file, its text, what must be said
BAD = {
    "up": ("spec.py", "from qatkit.nn import C", "spec:1 imports qatkit.nn, which is in a higher"),
    "up, plain": (
        "spec.py",
        "import qatkit.nn.conv",
        "imports qatkit.nn.conv, which is in a higher",
    ),
    "up, relative": (
        "nn/conv.py",
        "from .. import cli",
        "imports qatkit.cli, which is in a higher",
    ),
    "up, lazy": (
        "spec.py",
        "def f():\n    from qatkit.cli import f",
        "spec:2 imports qatkit.cli, w",
    ),
    "up, for types": (
        "spec.py",
        IF_TYPES + "from qatkit.nn.conv import C",
        "spec:3 imports qatkit",
    ),
    "the package": ("nn/conv.py", "from qatkit import Conv", "imports qatkit: the package itself"),
    "cycle": ("errors.py", "from qatkit.spec import QuantSpec", "cycle: qatkit."),
    "cycle in a part": ("nn/conv.py", "from qatkit.nn import Conv", "cycle: qatkit.nn"),
    "unknown module": ("stray.py", "", "qatkit.stray is in no layer"),
    "unknown package": ("stray/deep.py", "", "qatkit.stray.deep is in no layer"),
    "heavy": ("nn/conv.py", "import onnx.helper", "conv:1 imports onnx.helper at import time"),
    "heavy, from": ("cli.py", "from torchvision.models import resnet18", "at import time"),
    "heavy, tried": ("cli.py", "try:\n    import tqdm\nexcept ImportError:\n    pass", "cli:2"),
    "triton outside": ("nn/conv.py", "import triton", "conv:1 imports triton at import time"),
    "numba outside": ("nn/conv.py", "import numba", "conv:1 imports numba at import time"),
    "loops": ("nn/conv.py", "import qatkit.kernels.cpu.loops", "cpu.loops at import time"),
    "gpu kernels": ("nn/conv.py", "from qatkit.kernels import gpu", "kernels.gpu at import time"),
    "heavy, in a class": ("cli.py", "class C:\n    import safetensors", "cli:2"),
    "heavy, else": ("cli.py", IF_TYPES + "pass\nelse:\n    import onnx", "cli:5 imports onnx at"),
}


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "qatkit" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "qatkit"


def test_a_good_tree_passes(tmp_path: Path) -> None:
    assert violations(write_tree(tmp_path, GOOD)) == []


@pytest.mark.parametrize("case", BAD)
def test_a_bad_tree_is_caught(case: str, tmp_path: Path) -> None:
    name, text, message = BAD[case]
    broken = violations(write_tree(tmp_path, GOOD | {name: text}))
    assert any(message in line for line in broken), broken
