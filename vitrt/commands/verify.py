"""`vitrt verify`: an error table against transformers, on this machine."""

from __future__ import annotations

import argparse

from vitrt.commands.console import FAILED, OK
from vitrt.commands.options import add_model, add_runtime, open_model, runtime_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare every attention backend and mode that can run here with transformers' float32 "
        "and print the errors. Exit code 1 if one is past its bound: 1e-5 in float32, in other "
        "dtypes 1.05 times transformers' own error. --precision fp8 adds what that costs on these "
        "weights and images, which has no bound."
    )
    add_model(parser)
    parser.add_argument(
        "inputs", nargs="*", metavar="IMAGE", help="files, folders or @list.txt; none: made-up ones"
    )
    parser.add_argument(
        "--most-images", type=int, metavar="N", help="take the first N (default: 16)"
    )
    add_runtime(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 where an error is past its bound, else 0."""
    from vitrt.compare.sample_images import choose_images
    from vitrt.compare.verify import verify
    from vitrt.compare.verify_table import table_lines

    images = choose_images(args.inputs, args.most_images)
    result = verify(open_model(args), runtime_config(args), images)
    for line in table_lines(result):
        print(line)
    return OK if result.passed else FAILED
