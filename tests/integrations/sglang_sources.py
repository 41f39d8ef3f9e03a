"""What SGLang's Python sources say of the places where the tower goes, read without an import.

    python -m tests.integrations.sglang_sources SITE_PACKAGES VERSION    # adds to the recorded ones

As `engine_sources` is for vLLM: an installed SGLang is read where there is one.
"""

from __future__ import annotations

import ast
from pathlib import Path

from tests.integrations.engine_sources import (
    Facts,
    classes_of,
    keywords_of,
    method_of,
    parameters_of,
    reads_of,
    record,
    recorded_and_installed,
    tree_of,
)
from vitrt.integrations.sglang import ARCHITECTURES, TOWERS, EncoderRank, EncoderWorker

# Methods of a model that shares out items, not images; not in every version, nor every model.
SHARING = ("_get_visual_feature", "_materialize_visual_items")
RECORDED = Path(__file__).with_name("sglang_sources.json")


def all_sources() -> dict[str, Facts]:
    """Facts by version: of those recorded, and of the one that is installed."""
    return recorded_and_installed(RECORDED, "sglang", facts)


def facts(sglang: Path) -> Facts:
    models = {}
    towers = {}
    for architecture, module in ARCHITECTURES.items():
        tree = tree_of(sglang / "srt" / "models" / f"{module}.py")
        model = classes_of(tree)[architecture]
        models[architecture] = {
            "bases": [ast.unparse(base) for base in model.bases],
            "init": parameters_of(method_of(model, "__init__")),
            "load_weights": parameters_of(method_of(model, "load_weights")),
            "reads": sorted(reads_of(tree)),
        }
        if architecture in TOWERS:
            tower = TOWERS[architecture]
            models[architecture]["keywords"] = keywords_of(model, tower)
            towers[tower] = parameters_of(method_of(classes_of(tree)[tower], "forward"))
            text = ast.unparse(model)
            models[architecture]["data_parallel"] = "if self.use_data_parallel:" in text
            models[architecture]["sharing"] = {
                node.name: parameters_of(node)
                for node in model.body
                if isinstance(node, ast.FunctionDef) and node.name in SHARING
            }
    sharing = sglang / "srt" / "multimodal" / "mm_utils.py"
    plugins = (sglang / "srt" / "plugins" / "__init__.py").read_text()
    hooks = classes_of(tree_of(sglang / "srt" / "plugins" / "hook_registry.py"))
    return {
        "models": models,
        "towers": towers,
        "shared": sorted(_reads_of_sharing(sharing)),
        "share": parameters_of(_sharing(sharing)),
        "register": parameters_of(method_of(hooks["HookRegistry"], "register")),
        "hook_types": [
            node.targets[0].id  # type: ignore[attr-defined]
            for node in hooks["HookType"].body
            if isinstance(node, ast.Assign)
        ],
        "ranks": _reads_ranks(sglang / "srt"),
        "entry_point": '"sglang.srt.plugins"' in plugins,
        "allow_list": "SGLANG_PLUGINS" in plugins,
        "encoder_processes": {
            process.name: [name for name in process.modules if _has(sglang, name, process.name)]
            for process in (EncoderRank, EncoderWorker)
        },
    }


def _sharing(file: Path) -> ast.FunctionDef:
    return next(
        node
        for node in tree_of(file).body
        if isinstance(node, ast.FunctionDef) and node.name == "run_dp_sharded_mrope_vision_model"
    )


def _reads_of_sharing(file: Path) -> set[str]:
    """Attributes of the tower that are read where ranks share out images."""
    return {
        node.attr
        for node in ast.walk(_sharing(file))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "vision_model"
    }


def _reads_ranks(srt: Path) -> bool:
    """Whether towers are told the number of ranks by runtime_context.get_parallel().tp_size."""
    defined = {getattr(node, "name", None) for node in tree_of(srt / "runtime_context.py").body}
    tower = ast.unparse(tree_of(srt / "models" / "qwen3_vl.py"))
    imported = "from sglang.srt.runtime_context import " in tower
    return "get_parallel" in defined and imported and "get_parallel().tp_size" in tower


def _has(sglang: Path, module: str, name: str) -> bool:
    file = sglang.joinpath("srt", "disaggregation", *module.split(".")).with_suffix(".py")
    return file.exists() and any(
        isinstance(node, ast.FunctionDef) and node.name == name for node in tree_of(file).body
    )


if __name__ == "__main__":
    record(RECORDED, "sglang", facts)
