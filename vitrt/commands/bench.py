"""`vitrt bench` and scripts/bench.py."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from vitrt.bench.options import PEER_NAMES, BenchConfig
from vitrt.bench.workloads import WORKLOAD_NAMES
from vitrt.commands.console import FAILED, INTERRUPTED, OK, Parser
from vitrt.commands.options import add_fields, from_args, name_list, path_of, runtime_config
from vitrt.config import RuntimeConfig

TOWER = {
    "device": "default: cuda where there is one",
    "dtype": "default: bfloat16 on cuda, else float32",
    "attention": "vitrt's backend",
    "precision": "of vitrt's blocks: auto or fp8",
    "fp8_skip_blocks": "first blocks that fp8 leaves in the dtype",
    "cuda_graphs": "at every size or at none (default: as the encoder decides)",
}
RUN = {
    "workloads": ",".join(WORKLOAD_NAMES),
    "peers": f"{','.join(PEER_NAMES)}, or none",
    "scale": "auto: tiny on a CPU",
    "check": "compare outputs with transformers in float32",
    "profile": "time by kernel group",
    "ablate": "what each part is worth, as ratios",
    "memory": "peak memory beyond weights",
    "seconds": "of timing for each figure",
    "time_limit": "compile no further shapes after so many seconds (default: %(default)s)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time vitrt and transformers on the same weights and pixels, in one process and one run, "
        "and check that their outputs agree. Without a GPU, shapes are scaled down."
    )
    default = " ".join(BenchConfig().models)
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL|CONFIG",
        help="checkpoints (folder or hub id), or config.json files or released sizes with random "
        f"weights (default: {default})",
    )
    parser.add_argument("--models", dest="models_option", type=name_list, help=argparse.SUPPRESS)
    add_fields(parser, BenchConfig, RUN)
    add_fields(parser, RuntimeConfig, TOWER)
    parser.add_argument(
        "--graphs",
        dest="cuda_graphs",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
    parser.add_argument("--json", type=path_of, metavar="FILE", help="write every figure here")
    parser.add_argument("--quiet", action="store_true", help="tables only, no progress")


def run(args: argparse.Namespace) -> int:
    """Run and print; 1 where vitrt failed or disagrees, 130 where interrupted, else 0.

    An interrupted run (Ctrl-C, SIGTERM) prints and writes what it has. ValueError for bad
    arguments.
    """
    from vitrt.bench.as_json import to_json
    from vitrt.bench.runs import run_bench
    from vitrt.bench.tables import to_text

    models = tuple(args.models) or args.models_option or BenchConfig().models
    config = from_args(BenchConfig, args, models=models, runtime=runtime_config(args))
    if args.json is not None:
        _check_json(args.json)

    def progress(line: str) -> None:
        if not args.quiet:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = run_bench(config, progress)
    finally:
        signal.signal(signal.SIGTERM, before)
    try:  # whichever of the two cannot be written, the other one is
        if args.json is not None:
            args.json.write_text(json.dumps(to_json(result), indent=1) + "\n")
    finally:
        print(to_text(result))
    if result.interrupted:
        return INTERRUPTED
    return OK if result.passed else FAILED


def _check_json(file: Path) -> None:
    """ValueError where no file can go: to be found out before a run, not after it."""
    if file.is_dir():
        raise ValueError(f"--json {file} is a folder; give a file")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"--json {file} lies in a folder that does not exist")


def main(argv: list[str] | None = None) -> int:
    """The benchmark as a program of its own."""
    parser = Parser(prog="bench")
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        return run(args)
    except ValueError as error:
        parser.error(str(error))
