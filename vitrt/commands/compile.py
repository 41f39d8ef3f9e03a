"""`vitrt compile`: fill the folders that kernels are kept in, for a GPU that need not be there."""

from __future__ import annotations

import argparse
import os
import time

from vitrt.commands.console import OK
from vitrt.commands.options import add_fields, runtime_config
from vitrt.config import RuntimeConfig

TOWER = {
    "dtype": "default: bfloat16",
    "attention": "auto, or a backend",
    "precision": "of the blocks' products: auto (the dtype's) or fp8",
    "fp8_skip_blocks": "first blocks that fp8 leaves in the dtype",
    "batch_invariant": "what --batch-invariant of other commands runs",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compile what towers run on a GPU, without one (in a Dockerfile, say), so that the first "
        "process on a machine that has it compiles nothing. That process must find the same "
        "versions of everything, and the same folders."
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL|CONFIG",
        help="a checkpoint (folder or hub id), a config.json, or a released size: qwen3-vl-8b",
    )
    parser.add_argument("--arch", default="sm_90a", help="of the GPU (default: %(default)s)")
    add_fields(parser, RuntimeConfig, TOWER)


def run(args: argparse.Namespace) -> int:
    """Compile; 0. ValueError for a GPU that is not known, or one that cannot run what is asked."""
    from vitrt.compare.reference import find_model
    from vitrt.engine.ahead import compile_tower
    from vitrt.kernels.ahead import chip_of, kept_in

    chip, folders = chip_of(args.arch), kept_in()
    models = [find_model(model, weights=False) for model in args.models]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # whatever GPUs there are stay out of it
    for model in models:
        started = time.perf_counter()
        kernels = compile_tower(model.config, runtime_config(args), chip)
        seconds = time.perf_counter() - started
        print(f"{model.name}: {kernels} Triton kernels and the CuTe ones in {seconds:.0f} s")
    print(f"for {chip.arch}, in {' and '.join(folders)}")
    return OK
