"""What vLLM's Python sources say of the places where the tower goes, read without an import.

    python -m tests.integrations.engine_sources SITE_PACKAGES VERSION    # adds to the recorded ones

vLLM is too large to be installed for tests: they read an installed one where there is one, and else
what was recorded here from the wheels of several versions.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitrt.integrations.vllm import ARCHITECTURES

RECORDED = Path(__file__).with_name("engine_sources.json")


Facts = dict[str, Any]  # of one version


def all_sources() -> dict[str, Facts]:
    """Facts by version: of those recorded, and of the one that is installed."""
    return recorded_and_installed(RECORDED, "vllm", facts)


def recorded_and_installed(
    recorded: Path, package: str, read: Callable[[Path], Facts]
) -> dict[str, Facts]:
    """What `read` made of several versions, and makes of an installed package's folder."""
    found: dict[str, Facts] = json.loads(recorded.read_text())
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        return found
    return found | {"installed": read(Path(spec.origin).parent)}


def record(recorded: Path, package: str, read: Callable[[Path], Facts]) -> None:
    """Add what the version in SITE_PACKAGES says, by the command line."""
    known = json.loads(recorded.read_text()) if recorded.exists() else {}
    known[sys.argv[2]] = read(Path(sys.argv[1]) / package)
    recorded.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def facts(vllm: Path) -> Facts:
    registry = tree_of(vllm / "model_executor" / "models" / "registry.py")
    models = {}
    for architecture, (module, tower) in ARCHITECTURES.items():
        tree = tree_of(vllm / "model_executor" / "models" / f"{module}.py")
        model = classes_of(tree)[architecture]
        models[architecture] = {
            "keywords": keywords_of(model, tower),
            "init": parameters_of(method_of(model, "__init__")),
            "reads": sorted(reads_of(tree)),
            "sets_use_data_parallel": "self.use_data_parallel = " in ast.unparse(model),
        }
    towers = {}
    for module, tower in {ARCHITECTURES[name] for name in ARCHITECTURES}:
        tree = classes_of(tree_of(vllm / "model_executor" / "models" / f"{module}.py"))
        if tower in tree:
            towers[tower] = {
                "forward": parameters_of(method_of(tree[tower], "forward")),
                "load_weights": parameters_of(method_of(tree[tower], "load_weights")),
            }
    register = method_of(classes_of(registry)["_ModelRegistry"], "register_model")
    plugins = (vllm / "plugins" / "__init__.py").read_text()
    return {
        "models": models,
        "towers": towers,
        "register_model": parameters_of(register),
        "entry_point": "vllm.general_plugins" in plugins,
        "allow_list": "VLLM_PLUGINS" in plugins,
    }


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def classes_of(tree: ast.Module) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def method_of(node: ast.ClassDef, name: str) -> ast.FunctionDef:
    return next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == name)


def parameters_of(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    return [a.arg for a in (*arguments.args, *arguments.kwonlyargs) if a.arg != "self"]


def keywords_of(model: ast.ClassDef, tower: str) -> list[str]:
    """Of the call that makes the tower; a positional argument is its place."""
    for node in ast.walk(model):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == tower:
            return [str(i) for i in range(len(node.args))] + [k.arg or "**" for k in node.keywords]
    raise ValueError(f"{model.name} never makes a {tower}")


def reads_of(tree: ast.Module) -> set[str]:
    """Attributes of `self.visual` that are read outside vLLM's own encoder graphs."""
    found = set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and "cudagraph" not in function.name:
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self.visual":
                    found.add(node.attr)
    return found


if __name__ == "__main__":
    record(RECORDED, "vllm", facts)
