"""Arguments of `vitrt bench` and scripts/bench.py."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from vitrt.bench.options import PEER_NAMES, BenchConfig
from vitrt.bench.workloads import WORKLOAD_NAMES

DEFAULTS = BenchConfig()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.description = (
        "Time vitrt and transformers on the same weights and pixels, in one process and one run, "
        "and check that their outputs agree. Without a GPU, shapes are scaled down."
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL|CONFIG",
        help="checkpoints (folder or hub id), or config.json files or released sizes with random "
        f"weights (default: {' '.join(DEFAULTS.models)})",
    )
    parser.add_argument("--models", dest="models_option", type=_names, help=argparse.SUPPRESS)
    parser.add_argument(
        "--workloads", type=_names, default=DEFAULTS.workloads, help=",".join(WORKLOAD_NAMES)
    )
    parser.add_argument("--peers", type=_names, help=f"{','.join(PEER_NAMES)}, or none")
    parser.add_argument(
        "--device", default=DEFAULTS.device, help="default: cuda where there is one"
    )
    parser.add_argument(
        "--dtype", default=DEFAULTS.dtype, help="default: bfloat16 on cuda, else float32"
    )
    parser.add_argument("--attention", default=DEFAULTS.attention, help="vitrt's backend")
    parser.add_argument(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="CUDA graphs at every size or at none (default: as the encoder decides)",
    )
    parser.add_argument("--scale", choices=("auto", "full", "tiny"), default="auto")
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=DEFAULTS.check,
        help="compare outputs with transformers in float32",
    )
    parser.add_argument("--profile", action="store_true", help="time by kernel group")
    parser.add_argument("--ablate", action="store_true", help="what each part is worth, as ratios")
    parser.add_argument("--memory", action="store_true", help="peak memory beyond weights")
    parser.add_argument(
        "--seconds", type=float, default=DEFAULTS.seconds, help="of timing for each figure"
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=DEFAULTS.time_limit,
        metavar="SECONDS",
        help="compile no further shapes after this (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    parser.add_argument("--quiet", action="store_true", help="tables only, no progress")


def run(args: argparse.Namespace) -> int:
    """Run and print; 1 where vitrt failed or disagrees, 130 where interrupted, else 0.

    An interrupted run (Ctrl-C, SIGTERM) prints and writes what it has. ValueError for bad
    arguments.
    """
    # Here, since other commands than `vitrt bench` declare these arguments too.
    from vitrt.bench.report import to_json, to_text
    from vitrt.bench.runs import run_bench

    config = _config(args)
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
        sys.stdout.write(to_text(result) + "\n")
    if result.interrupted:
        return 130
    rows = [row for model in result.models for row in model.rows]
    return 1 if any("vitrt" in row.failures or not row.agrees for row in rows) else 0


def _check_json(file: Path) -> None:
    """ValueError where no file can go: to be found out before a run, not after it."""
    if file.is_dir():
        raise ValueError(f"--json {file} is a folder; give a file")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"--json {file} lies in a folder that does not exist")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name and name != "none")


def _config(args: argparse.Namespace) -> BenchConfig:
    return BenchConfig(
        models=tuple(args.models) or args.models_option or DEFAULTS.models,
        workloads=args.workloads,
        peers=args.peers,
        device=args.device,
        dtype=args.dtype,
        attention=args.attention,
        cuda_graphs=args.graphs,
        tiny=None if args.scale == "auto" else args.scale == "tiny",
        check=args.check,
        profile=args.profile,
        ablate=args.ablate,
        memory=args.memory,
        seconds=args.seconds,
        time_limit=args.time_limit,
    )


def main(argv: list[str] | None = None) -> int:
    """The benchmark as a program of its own."""
    parser = argparse.ArgumentParser(prog="bench")
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        return run(args)
    except ValueError as error:
        parser.error(str(error))
