"""Arguments that several subcommands share, and what becomes of them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from vitrt.config import RuntimeConfig

if TYPE_CHECKING:
    from vitrt.checkpoint.opened import Checkpoint

DEFAULTS = RuntimeConfig()


def add_runtime(parser: argparse.ArgumentParser) -> None:
    """Declare what `runtime_config` reads."""
    parser.add_argument("--device", default=DEFAULTS.device, help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--dtype", default=DEFAULTS.dtype, help="auto, bfloat16, float16 or float32"
    )
    parser.add_argument("--min-pixels", type=int, metavar="N", help="least area of a resized image")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="largest area")


def layer_list(text: str) -> tuple[int, ...]:
    """Layers from "8,16,-1"; for argparse."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of layers: whole numbers with commas between, as in 8,16,-1"
        ) from None


def open_model(args: argparse.Namespace, *, weights: bool = True) -> Checkpoint:
    """The checkpoint that MODEL names."""
    from vitrt.checkpoint.opened import open_checkpoint

    return open_checkpoint(
        args.model,
        revision=args.revision,
        cache_dir=args.cache_dir,
        local_files_only=args.local_files_only,
        weights=weights,
    )


def runtime_config(args: argparse.Namespace, **more: Any) -> RuntimeConfig:
    """What `add_runtime` declared, and `more` of its fields."""
    return RuntimeConfig(
        device=args.device,
        dtype=args.dtype,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
        **more,
    )
