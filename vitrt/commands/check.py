"""`vitrt check`: whether an output folder holds what its manifests promise."""

from __future__ import annotations

import argparse

from vitrt.commands.console import FAILED, OK
from vitrt.commands.options import path_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Read an output folder back and verify it. Exit code 1 if anything is wrong."
    )
    parser.add_argument("folder", type=path_of, metavar="DIR")


def run(args: argparse.Namespace) -> int:
    """Check; 1 where there is a problem, else 0."""
    from vitrt.store.check import check_folder

    result = check_folder(args.folder)
    for line in result.lines():
        print(line)
    return FAILED if result.problems else OK
