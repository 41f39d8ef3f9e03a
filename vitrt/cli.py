"""The command `vitrt`: its subcommands, and their exit codes."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vitrt.commands import encode
from vitrt.commands.console import (
    FAILED,
    INTERRUPTED,
    OK,
    let_go,
    set_up_logging,
    stand_in_for_closed_streams,
)
from vitrt.commands.options import add_runtime, layer_list, open_model, runtime_config
from vitrt.version import __version__

logger = logging.getLogger("vitrt")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code."""
    stand_in_for_closed_streams()
    args = _parser().parse_args(arguments)
    set_up_logging(verbose=args.verbose, as_json=getattr(args, "log_json", False))
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except KeyboardInterrupt:
        logger.error("interrupted")
        return INTERRUPTED
    except (ValueError, OSError) as error:
        logger.debug("", exc_info=True)
        logger.error("%s", error)
        return FAILED
    except Exception:
        logger.exception("this should not have happened")
        return FAILED
    finally:
        let_go(sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:  # argparse's own exit code is 2
        self.print_usage(sys.stderr)
        self.exit(FAILED, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", help="log how things ran, too")
    model = _Parser(add_help=False)
    model.add_argument("model", metavar="MODEL", help="a checkpoint folder or a hub id")
    model.add_argument("--revision", help="of a hub id: branch, tag or commit")
    model.add_argument("--cache-dir", help="of a hub id: where downloads lie")
    model.add_argument(
        "--local-files-only", action="store_true", default=None, help="download nothing"
    )
    parser = _Parser(prog="vitrt", description="Vision features of Qwen2.5-VL and Qwen3-VL.")
    parser.add_argument("--version", action="version", version=f"vitrt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    _add_encode(commands.add_parser("encode", parents=[model, common], help="images -> features"))
    _add_extract(
        commands.add_parser("extract", parents=[model, common], help="a vision-only checkpoint")
    )
    _add_info(commands.add_parser("info", parents=[model, common], help="describe a checkpoint"))
    _add_check(commands.add_parser("check", parents=[common], help="verify an output folder"))
    _add_show(
        commands.add_parser("show", parents=[model, common], help="a picture of the features")
    )
    _add_verify(
        commands.add_parser("verify", parents=[model, common], help="errors against transformers")
    )
    _add_bench(commands.add_parser("bench", parents=[common], help="speed against transformers"))
    return parser


def _add_encode(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=encode.run)
    encode.add_arguments(parser)


def _add_extract(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_extract)
    parser.description = "Write the vision tower alone: config, preprocessor, one safetensors file."
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--overwrite", action="store_true", help="replace the files in DIR")


def _extract(args: argparse.Namespace) -> int:
    from vitrt.checkpoint.extract import extract_tower

    checkpoint = open_model(args)
    folder = extract_tower(checkpoint, args.output, overwrite=args.overwrite)
    print(f"{len(checkpoint.tensors)} tensors, {checkpoint.num_bytes / 1e6:.1f} MB in {folder}")
    return OK


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_info)
    parser.description = (
        "Family, size, cost by image size, and the attention backends that can run."
    )
    add_runtime(parser)


def _info(args: argparse.Namespace) -> int:
    from vitrt.commands.info import describe

    for line in describe(open_model(args, weights=False), runtime_config(args)):
        print(line)
    return OK


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_check)
    parser.description = (
        "Read an output folder back and verify it. Exit code 1 if anything is wrong."
    )
    parser.add_argument("folder", type=Path, metavar="DIR")


def _check(args: argparse.Namespace) -> int:
    from vitrt.store.check import check_folder, report

    result = check_folder(args.folder)
    for line in report(result):
        print(line)
    return FAILED if result.problems else OK


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_show)
    parser.description = (
        "Save the image beside the first three principal components, as colours, of its "
        "embeddings and of each deepstack level."
    )
    parser.add_argument("image", type=Path, metavar="IMAGE")
    parser.add_argument("--output", required=True, type=Path, metavar="PNG")
    parser.add_argument(
        "--layers", type=layer_list, default=(), metavar="N,N,...", help="and after these layers"
    )
    add_runtime(parser)


def _show(args: argparse.Namespace) -> int:
    from vitrt.commands.show import check_output, show
    from vitrt.encoder import VisionEncoder

    check_output(args.output, args.image)
    runtime = runtime_config(args, cuda_graphs=False)
    encoder = VisionEncoder.from_checkpoint(open_model(args), runtime)
    print(show(encoder, args.image, args.output, layers=args.layers))
    return OK


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_verify)
    parser.description = (
        "Compare every attention backend and mode that can run here with transformers' float32 "
        "and print the errors. Exit code 1 if one is past its bound: 1e-5 in float32, in other "
        "dtypes 1.05 times transformers' own error."
    )
    parser.add_argument(
        "inputs", nargs="*", metavar="IMAGE", help="files, folders or @list.txt; none: made-up ones"
    )
    parser.add_argument(
        "--most-images", type=int, metavar="N", help="take the first N (default: 16)"
    )
    add_runtime(parser)


def _verify(args: argparse.Namespace) -> int:
    from vitrt.compare.verify import choose_images, verify
    from vitrt.compare.verify_table import report

    images = choose_images(args.inputs, args.most_images)
    result = verify(open_model(args), runtime_config(args), images)
    for line in report(result):
        print(line)
    return OK if result.passed else FAILED


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from vitrt.bench.cli import add_arguments

    parser.set_defaults(command=_bench)
    add_arguments(parser)


def _bench(args: argparse.Namespace) -> int:
    from vitrt.bench.cli import run

    return run(args)
