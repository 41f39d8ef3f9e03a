"""Options that several subcommands share: their names, types and defaults are dataclass fields."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from vitrt.config import RuntimeConfig

if TYPE_CHECKING:
    from vitrt.checkpoint.opened import Checkpoint

Config = TypeVar("Config")

# What every command that runs a tower takes.
RUNTIME = {
    "device": "auto, cpu, cuda, cuda:1, ...",
    "dtype": "auto, bfloat16, float16 or float32",
    "min_pixels": "least area of a resized image",
    "max_pixels": "largest area",
    "video_min_pixels": "least area of a clip, counted as the model's video processor counts it",
    "video_max_pixels": "largest",
    "fps": "frames of a video that are looked at, a second (default: as the model says, else 2)",
    "num_frames": "the same in all",
    "min_frames": "fewest of what --fps gives",
    "max_frames": "most",
    "frames": "of an animated GIF, WebP or PNG: the first frame, or all as a clip",
    "precision": "of the blocks' products: auto (the dtype's) or fp8, faster and coarser",
    "fp8_skip_blocks": "first blocks that fp8 leaves in the dtype",
    "batch_invariant": "features are the same bits whatever else is in a batch",
}


def add_fields(parser: argparse.ArgumentParser, config: type, helps: dict[str, str]) -> None:
    """Declare an option for each field of the dataclass `config` that `helps` names."""
    hints = get_type_hints(config)
    for field in fields(config):
        if field.name in helps:
            assert field.default is not MISSING
            parser.add_argument(
                "--" + field.name.replace("_", "-"),
                default=field.default,
                help=helps[field.name],
                **_argument(hints[field.name], field.default),
            )
    unknown = helps.keys() - hints.keys()
    assert not unknown, f"{config.__name__} has no {unknown}"


def _argument(hint: Any, default: object) -> dict[str, Any]:
    """How argparse reads a value of the type `hint`."""
    kinds = _members(hint)
    if bool in kinds:
        # A flag that is off by default needs no --no-.
        return {"action": "store_true" if default is False else argparse.BooleanOptionalAction}
    if get_origin(kinds[0]) is tuple:
        numbers = get_args(kinds[0])[0] is int
        return {"type": layer_list if numbers else name_list, "metavar": "N,N,..."}
    if get_origin(kinds[0]) is Literal:
        return {"choices": get_args(kinds[0])}
    return {"type": kinds[0], "metavar": None if kinds[0] is str else "N"}


def _members(hint: Any) -> list[Any]:
    """The types of a union, None left out, or the type itself."""
    if isinstance(hint, type) or get_origin(hint) in (tuple, Literal):
        return [hint]
    return [kind for kind in get_args(hint) if kind is not NoneType]


def from_args(config: type[Config], args: argparse.Namespace, **more: Any) -> Config:
    """The dataclass `config` from the options that `args` holds, and `more` of its fields.

    Raises ValueError as `config` does.
    """
    names: Iterable[str] = (field.name for field in fields(config))  # type: ignore[arg-type]
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return config(**(given | more))


def runtime_config(args: argparse.Namespace, **more: Any) -> RuntimeConfig:
    return from_args(RuntimeConfig, args, **more)


def add_runtime(parser: argparse.ArgumentParser, **more: str) -> None:
    """Declare what `runtime_config` reads: `RUNTIME`, and `more` fields with their help."""
    add_fields(parser, RuntimeConfig, RUNTIME | more)


def path_of(text: str) -> Path:
    """A path that is not empty, as one from an unset variable is: that would mean the folder that
    the command runs in. For argparse.
    """
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; '.' is the folder this runs in")
    return Path(text)


def layer_list(text: str) -> tuple[int, ...]:
    """Layers from "8,16,-1"; for argparse."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of layers: whole numbers with commas between, as in 8,16,-1"
        ) from None


def name_list(text: str) -> tuple[str, ...]:
    """Names from "one,another"; of "none" there are none. For argparse."""
    return tuple(name for name in text.split(",") if name and name != "none")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Declare what `open_model` reads."""
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder or a hub id")
    parser.add_argument("--adapter", help="a PEFT LoRA over MODEL: a folder or a hub id")
    parser.add_argument("--revision", help="of a hub id: branch, tag or commit")
    parser.add_argument("--cache-dir", help="of a hub id: where downloads lie")
    parser.add_argument(
        "--local-files-only", action="store_true", default=None, help="download nothing"
    )


def open_model(args: argparse.Namespace, *, weights: bool = True) -> Checkpoint:
    """The checkpoint that MODEL names."""
    from vitrt.checkpoint.opened import open_checkpoint

    return open_checkpoint(
        args.model,
        adapter=args.adapter,
        revision=args.revision,
        cache_dir=args.cache_dir,
        local_files_only=args.local_files_only,
        weights=weights,
        min_pixels=getattr(args, "min_pixels", None),
        max_pixels=getattr(args, "max_pixels", None),
    )
