"""`vitrt extract`: the vision tower of a checkpoint as a checkpoint of its own."""

from __future__ import annotations

import argparse

from vitrt.commands.console import OK
from vitrt.commands.options import add_model, open_model, path_of
from vitrt.messages import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write the vision tower alone: config, preprocessor, one safetensors file."
    add_model(parser)
    parser.add_argument("--output", required=True, type=path_of, metavar="DIR")
    parser.add_argument("--overwrite", action="store_true", help="replace the files in DIR")


def run(args: argparse.Namespace) -> int:
    """Extract; 0. Raises CheckpointError."""
    from vitrt.checkpoint.extract import extract_tower
    from vitrt.checkpoint.opened import open_checkpoint

    folder = extract_tower(open_model(args), args.output, overwrite=args.overwrite)
    written = open_checkpoint(folder)
    tensors = counted(len(written.tensors), "tensor")
    print(f"{tensors}, {written.num_bytes / 1e6:.1f} MB in {folder}")
    return OK
