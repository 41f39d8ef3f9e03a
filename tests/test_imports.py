"""Imports go one way, and `import vitrt` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "vitrt"

# What each level may import, itself included. A name stands for a module or for a whole package.
LEAVES = ("config", "features", "symmetric_memory", "version", "attention.base")
KERNELS = ("kernels", "attention.base")
ATTENTION = ("attention", *KERNELS)
LAYERS = ("layers", "config", "distributed", *ATTENTION)
MODELS = ("models", *LAYERS)
ALLOWED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(LEAVES, ()),
    "distributed": ("symmetric_memory",),
    "kernels": KERNELS,
    "attention": ATTENTION,
    "layers": LAYERS,
    "models": MODELS,
}
# Programs, and what stands beside them: the only ones that may import the encoder.
TOP = ("cli", "__main__", "__init__", "bench", "commands", "integrations", "job")
# What reads and writes features must work without a model.
STORAGE = ("output", "store")


def within(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imported(source: str, module: str, modules: Mapping[str, object]) -> Iterator[str]:
    """What `module` imports from the package when it runs, functions included, types not."""
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (
                name.name.removeprefix("vitrt.") for name in node.names if "vitrt" in name.name
            )
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide the direction"
            package = node.module or ""
            if package == "vitrt" or package.startswith("vitrt."):
                for name in node.names:
                    whole = f"{package}.{name.name}".removeprefix("vitrt.")
                    short = package.removeprefix("vitrt").removeprefix(".")
                    yield whole if whole in modules else short or "__init__"
        elif is_type_checking(node):
            pending.extend(node.orelse)
        else:
            pending.extend(ast.iter_child_nodes(node))


def read_package() -> dict[str, set[str]]:
    """Module name without `vitrt.` -> what it imports; a package goes by its own name."""
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        files[name] = path
    return {
        name: set(imported(path.read_text(), name, files)) - {name} for name, path in files.items()
    }


GRAPH = read_package()


def may_import(module: str, target: str) -> bool:
    levels = [name for name in ALLOWED if within(module, (name,))]
    if levels:  # the longest name decides: attention.base is a leaf inside attention
        return within(target, ALLOWED[max(levels, key=len)])
    return within(module, (*TOP, "encoder")) or not within(target, (*TOP, "encoder"))


def level_errors(graph: Mapping[str, set[str]]) -> list[str]:
    return [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in sorted(targets)
        if not may_import(module, target)
    ]


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules of one import cycle, in order; empty where there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph.get(module, ())):
            if found := visit(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in graph if (found := visit(module, []))), [])


def reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    pending = [start]
    while pending:
        module = pending.pop()
        if module not in seen:
            seen.add(module)
            pending.extend(graph.get(module, ()))
    return seen


def test_levels_import_downward() -> None:
    assert level_errors(GRAPH) == []


def test_no_cycles() -> None:
    assert cycle(GRAPH) == []


@pytest.mark.parametrize("module", [name for name in GRAPH if within(name, STORAGE)])
def test_storage_needs_no_model(module: str) -> None:
    reached = reachable(GRAPH, module)
    assert not {name for name in reached if within(name, ("encoder", "models", "layers", *TOP))}


def test_the_named_modules_exist() -> None:
    assert not {*TOP, *STORAGE, *ALLOWED} - set(GRAPH), "renamed? then name them anew"


def test_the_checks_see_what_is_wrong() -> None:
    source = (
        "from typing import TYPE_CHECKING\nimport vitrt.config\n"
        "from vitrt.layers import mlp, Norm\n"
        "if TYPE_CHECKING:\n    from vitrt.encoder import VisionEncoder\n"
        "def late():\n    from vitrt import cli\n"
    )
    modules = {"layers": 0, "layers.mlp": 0, "cli": 0, "config": 0}
    assert set(imported(source, "x", modules)) == {"config", "layers", "layers.mlp", "cli"}
    assert level_errors({"kernels.rope": {"layers.mlp"}}) == ["kernels.rope imports layers.mlp"]
    assert level_errors({"config": {"version"}}) == ["config imports version"]
    assert level_errors({"attention.base": {"kernels.rope"}}) != []
    assert level_errors({"weights": {"encoder"}}) != []
    assert level_errors({"encoder": {"cli"}}) == []  # a cycle, as cli imports encoder
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_leaves_transformers_and_the_gpu_alone() -> None:
    out = run(
        "import sys, torch\n"
        "def touched(*args, **kwargs): raise AssertionError('the GPU was asked')\n"
        "names = ['_lazy_init', 'is_available', 'device_count', 'get_device_properties',\n"
        "         'get_device_capability', 'current_device', 'get_device_name', 'mem_get_info']\n"
        "for name in names:\n"
        "    assert hasattr(torch.cuda, name)\n"
        "    setattr(torch.cuda, name, touched)\n"
        "import vitrt\n"
        "for name in vitrt.__all__: getattr(vitrt, name)\n"
        "print('transformers' in sys.modules, sorted(vitrt.__all__))"
    )
    assert out.startswith("False"), out
    for name in ("VisionEncoder", "FeatureStore", "ImageFeatures", "EncoderOutput"):
        assert f"'{name}'" in out


def test_loading_and_encoding_import_no_compiler(tiny_qwen2_5_vl: Path) -> None:
    """torch brings its compiler and sympy in from many a side door, for half a second and more."""
    out = run(
        "import sys, torch; before = set(sys.modules)\n"
        "from PIL import Image; from vitrt import VisionEncoder\n"
        f"encoder = VisionEncoder.from_pretrained({str(tiny_qwen2_5_vl)!r}, device='cpu')\n"
        "encoder.encode([Image.new('RGB', (64, 64))])\n"
        "heavy = {'sympy', 'torch._dynamo', 'torch._inductor', 'transformers'}\n"
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    assert out.strip() == "[]", out


def test_import_takes_little_longer_than_torch() -> None:
    code = (
        "from time import perf_counter as now\n"
        "a = now(); import torch; b = now(); import vitrt\n"
        "for name in vitrt.__all__: getattr(vitrt, name)\n"
        "c = now(); print((c - a) / (b - a))"
    )
    # The least of three: a busy machine only ever adds.
    ratios = []
    while len(ratios) < 3 and min(ratios, default=2.0) >= 1.5:
        ratios.append(float(run(code)))
    assert min(ratios) < 1.5, ratios
