"""`vitrt export`: an output folder as a table of ids and vectors."""

from __future__ import annotations

import argparse

from vitrt.commands.console import OK
from vitrt.commands.options import path_of
from vitrt.messages import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write the ids and the pooled features of an output folder as one table, with a column "
        "`id` and a column `vector` of fixed-size lists of float32."
    )
    parser.add_argument("folder", type=path_of, metavar="DIR")
    parser.add_argument("--to", choices=("parquet", "lance"), required=True)
    parser.add_argument(
        "--output", type=path_of, metavar="PATH", help="default: DIR.parquet, DIR.lance"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def run(args: argparse.Namespace) -> int:
    """Write the table and say where."""
    from vitrt.store.export import export_vectors

    path, rows = export_vectors(args.folder, args.to, args.output, overwrite=args.overwrite)
    print(f"{counted(rows, 'vector')} in {path}")
    return OK
