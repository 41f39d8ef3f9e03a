"""Imports go one way, and `import vitrt` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "vitrt"

# Room -> the rooms that it may import, types included. A file at the top is a room of its own.
BELOW_ENGINE = (
    "messages",
    "config",
    "cores",
    "features",
    "parallel",
    "kernels",
    "attention",
    "layers",
    "models",
)
BESIDE_ENGINE = ("images", "checkpoint", "store", "sources")
BELOW_ENCODER = (*BELOW_ENGINE, *BESIDE_ENGINE, "engine", "tensor_file", "version")
PROGRAMS = ("job", "bench", "compare", "integrations")
ALLOWED: dict[str, tuple[str, ...]] = {
    "version": (),
    "config": (),
    "cores": (),
    "messages": (),
    "tensor_file": ("messages",),
    "features": ("messages",),
    "kernels": ("cores",),
    "parallel": ("messages",),
    "attention": ("kernels",),
    "layers": ("config", "parallel", "kernels", "attention"),
    "models": ("config", "parallel", "kernels", "attention", "layers"),
    "engine": BELOW_ENGINE,
    "images": ("config", "cores", "messages"),
    "checkpoint": ("config", "messages", "images", "models", "tensor_file", "version"),
    "store": ("config", "messages", "features", "tensor_file", "version"),
    "sources": ("config", "messages"),
    "encoder": BELOW_ENCODER,
    "compare": ("encoder", *BELOW_ENCODER),
    "job": ("encoder", *BELOW_ENCODER),
    "bench": ("compare", "encoder", *BELOW_ENCODER),
    "integrations": ("job", "encoder", *BELOW_ENCODER),
    "commands": (*PROGRAMS, "encoder", *BELOW_ENCODER),
    "cli": ("commands", "version"),
    "__main__": ("cli",),
}
# Of these only `vitrt.room` and the modules that its `__all__` names may be imported from outside.
# What is left of an older plan; nothing is added here.
TO_MEND: frozenset[str] = frozenset()


@dataclass(frozen=True, order=True)
class Import:
    importer: str  # "engine.loader"
    imported: str  # "checkpoint.opened"

    @property
    def rooms(self) -> tuple[str, str]:
        return self.importer.split(".")[0], self.imported.split(".")[0]

    def __str__(self) -> str:
        return f"{self.importer} -> {self.imported}"


def imports_of(source: str, importer: str, modules: Mapping[str, object]) -> Iterator[Import]:
    """What a module imports from the package, in functions and for types as well."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer}: relative imports hide the direction"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "vitrt":
                parts = name.split(".")[1:] or ["__init__"]
                while parts and ".".join(parts) not in modules:  # a name inside a module
                    parts.pop()
                yield Import(importer, ".".join(parts) or "__init__")


def read_package() -> dict[str, Path]:
    """Module name without `vitrt.` -> its file; a room goes by its own name."""
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        files[name] = path
    return files


FILES = read_package()
IMPORTS = sorted(
    {found for name, path in FILES.items() for found in imports_of(path.read_text(), name, FILES)}
)


def door_of(room: str) -> frozenset[str]:
    """What a room's `__init__` names in `__all__`."""
    for node in ast.parse(FILES[room].read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return frozenset(ast.literal_eval(node.value))
    return frozenset()


def wrong_ways(imports: Iterable[Import]) -> list[str]:
    """Imports of a room that may not be imported there."""
    return [
        str(found)
        for found in imports
        if (rooms := found.rooms)[0] != rooms[1]
        and rooms[0] != "__init__"
        and rooms[1] not in ALLOWED[rooms[0]]
    ]


def past_the_door(imports: Iterable[Import], doors: Mapping[str, frozenset[str]]) -> list[str]:
    """Imports of what a room does not offer."""
    return [
        str(found)
        for found in imports
        if found.rooms[0] != found.rooms[1]
        and "." in found.imported
        and found.imported.split(".")[1] not in doors[found.rooms[1]]
    ]


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """The nodes of one import cycle, in order; empty where there is none."""
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


def graph_of(pairs: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for importer, imported in pairs:
        if importer != imported:
            graph.setdefault(importer, set()).add(imported)
    return graph


def test_rooms_import_downward() -> None:
    assert set(wrong_ways(IMPORTS)) - TO_MEND == set()


def test_rooms_are_entered_by_the_door() -> None:
    doors = {room: door_of(room) for room in FILES if "." not in room}
    assert set(past_the_door(IMPORTS, doors)) - TO_MEND == set()


def test_nothing_to_mend_is_mended() -> None:
    doors = {room: door_of(room) for room in FILES if "." not in room}
    left = {*wrong_ways(IMPORTS), *past_the_door(IMPORTS, doors)}
    assert TO_MEND - left == set(), "take these off the list"


def test_no_cycles_between_modules() -> None:
    inside = (f for f in IMPORTS if "__init__" not in f.rooms and str(f) not in TO_MEND)
    assert cycle(graph_of((f.importer, f.imported) for f in inside)) == []


def test_the_plan_has_no_cycles_and_names_every_room() -> None:
    assert cycle({room: set(below) for room, below in ALLOWED.items()}) == []
    assert {name.split(".")[0] for name in FILES} - {"__init__"} == set(ALLOWED)


def test_the_checks_see_what_is_wrong() -> None:
    source = (
        "from typing import TYPE_CHECKING\nimport vitrt.config\n"
        "from vitrt.layers import mlp, Norm\n"
        "if TYPE_CHECKING:\n    from vitrt.encoder import VisionEncoder\n"
        "def late():\n    from vitrt import cli\n"
    )
    modules = {"layers": 0, "layers.mlp": 0, "cli": 0, "config": 0, "encoder": 0}
    found = list(imports_of(source, "kernels.rope", modules))
    names = {each.imported for each in found}
    assert names == {"config", "layers", "layers.mlp", "encoder", "cli"}
    assert len(wrong_ways(found)) == 5
    assert past_the_door(found, {"layers": frozenset({"mlp"})}) == []
    assert past_the_door(found, {"layers": frozenset()}) == ["kernels.rope -> layers.mlp"]
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


def test_importing_all_names_brings_little_and_asks_no_gpu() -> None:
    """What a process pays for that may use none of it; transformers alone takes seconds."""
    out = run(
        "import sys, torch\n"
        "def touched(*args, **kwargs): raise AssertionError('the GPU was asked')\n"
        "names = ['_lazy_init', 'is_available', 'device_count', 'get_device_properties',\n"
        "         'get_device_capability', 'current_device', 'get_device_name', 'mem_get_info']\n"
        "for name in names:\n"
        "    assert hasattr(torch.cuda, name)\n"
        "    setattr(torch.cuda, name, touched)\n"
        "before = set(sys.modules); import vitrt\n"
        "for name in vitrt.__all__: getattr(vitrt, name)\n"
        "print(*vitrt.__all__)\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - set(sys.stdlib_module_names)))"
    )
    names, packages = (line.split() for line in out.splitlines())
    assert {"VisionEncoder", "FeatureStore", "ImageFeatures", "EncoderOutput"} <= set(names)
    known = {"vitrt", "PIL", "numpy", "nanoarrow", "safetensors", "triton"}
    assert {name for name in packages if not name.startswith(("_", "cython"))} <= known, out


def test_loading_and_encoding_import_no_compiler(
    tiny_qwen2_5_vl: Path, tiny_qwen3_vl: Path
) -> None:
    """torch brings its compiler and sympy in from many a side door, for half a second and more."""
    out = run(
        "import sys\n"
        "from PIL import Image; from vitrt import VisionEncoder\n"
        f"for folder in {[str(tiny_qwen2_5_vl), str(tiny_qwen3_vl)]}:\n"
        "    encoder = VisionEncoder.from_pretrained(folder, device='cpu')\n"
        "    encoder.encode([Image.new('RGB', (64, 64))])\n"
        "heavy = {'sympy', 'torch._dynamo', 'torch._inductor', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert out.strip() == "[]", out
