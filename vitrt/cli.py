"""The command `vitrt`: arguments and exit codes."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrt.commands.console import INTERRUPTED, graceful_interrupts, set_up_logging
from vitrt.config import RuntimeConfig
from vitrt.version import __version__

if TYPE_CHECKING:
    from vitrt.job.encode import Summary

logger = logging.getLogger("vitrt")

OK, FAILED, SKIPPED = 0, 1, 3
_RUNTIME = RuntimeConfig()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code."""
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:  # argparse's own exit code is 2
        self.print_usage(sys.stderr)
        self.exit(FAILED, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", help="log more")
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


def _add_runtime(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=_RUNTIME.device, help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--dtype", default=_RUNTIME.dtype, help="auto, bfloat16, float16 or float32"
    )
    parser.add_argument("--min-pixels", type=int, metavar="N", help="least area of a resized image")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="largest area")


def _add_encode(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_encode)
    parser.description = (
        "Encode images into a folder of safetensors shards. Running the same command again "
        "encodes what is missing or has changed. Exit codes: 0 all encoded, 1 an error, 3 some "
        "images skipped (see errors-*.jsonl), 130 interrupted."
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="a folder, an image, or @list.txt"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    _add_runtime(parser)
    parser.add_argument("--attention", default=_RUNTIME.attention, help="a backend of vitrt info")
    parser.add_argument(
        "--cuda-graphs", action=argparse.BooleanOptionalAction, default=_RUNTIME.cuda_graphs
    )
    parser.add_argument("--resize", choices=("pillow", "torch"), default=_RUNTIME.resize)
    parser.add_argument("--max-batch-tokens", type=int, metavar="N", help="patches of one forward")
    parser.add_argument("--workers", type=int, metavar="N", help="decoding threads")
    # Defaults of the options below are EncodeOptions'; None stands for them.
    parser.add_argument("--shard-mib", type=float, metavar="N", help="size of a shard")
    parser.add_argument("--pool", choices=("none", "mean"), help="mean: one row an image")
    parser.add_argument(
        "--layers",
        type=_layers,
        metavar="N,N,...",
        help="also keep the hidden states after these layers, from 0 or, as in --layers=-1, from "
        "the last",
    )
    parser.add_argument(
        "--merged",
        action=argparse.BooleanOptionalAction,
        help="--no-merged: keep hidden states only, and run no layer past the last of --layers",
    )
    parser.add_argument("--on-error", choices=("skip", "fail"), help="what a bad image does")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        default=None,
        help="first remove the features that the folder holds",
    )
    parser.add_argument(
        "--max-image-pixels",
        type=int,
        metavar="N",
        help="refuse larger images before decoding them (0: none; default: Pillow's limit)",
    )
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="GPUs that share a model")
    parser.add_argument(
        "--all-reduce",
        choices=("auto", "nccl", "symmetric"),
        default="auto",
        help="how GPUs that share a model add up their parts",
    )
    parser.add_argument("--log-json", action="store_true", help="log as JSON lines")


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of layers: whole numbers with commas between, as in 8,16,-1"
        ) from None


def _encode(args: argparse.Namespace) -> int:
    from vitrt.job.encode import EncodeOptions, encode_folder, follow_leader
    from vitrt.job.leader import GroupError
    from vitrt.job.listing import Inputs
    from vitrt.job.pipeline import Stop
    from vitrt.job.progress import Progress, Reporter, Style
    from vitrt.job.ranks import open_job
    from vitrt.job.watchdog import PeerFailedError

    names = ("workers", "shard_mib", "pool", "on_error", "overwrite", "layers", "merged")
    chosen = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options = EncodeOptions(**chosen)
    runtime = _runtime(
        args, attention=args.attention, cuda_graphs=args.cuda_graphs, resize=args.resize,
        max_batch_tokens=args.max_batch_tokens,
    )  # fmt: skip
    inputs = Inputs(args.inputs)
    _limit_image_size(args.max_image_pixels)
    progress, stop = Progress(), Stop()
    try:
        with (
            graceful_interrupts(stop),
            open_job(args.tp, device=args.device, stop=stop, all_reduce=args.all_reduce) as job,
        ):
            if not job.is_first and not args.verbose:
                logger.setLevel(logging.WARNING)
            if job.follows:
                follow_leader(_open(args), runtime, options, job.parallel)
                return OK
            if options.workers is None:
                options = replace(options, workers=job.workers)
            style: Style = "none" if not job.is_first else "json" if args.log_json else "auto"
            with Reporter(progress, style):
                summary = encode_folder(
                    _open(args), runtime, inputs, args.output, options,
                    progress=progress, stop=stop, ranks=job.shared, parallel=job.parallel,
                )  # fmt: skip
            # What the first rank says stands for all of them, so torchrun sees one exit code.
            return _conclude(summary, args.output, as_json=args.log_json) if job.is_first else OK
    except PeerFailedError:
        return FAILED  # which rank and why was said when it was noticed
    except GroupError as error:
        logger.error("%s", error)
        return FAILED


def _conclude(summary: Summary, output: Path, *, as_json: bool) -> int:
    from vitrt.job.progress import write_json

    state = summary.state
    code = INTERRUPTED if summary.interrupted else SKIPPED if state.skipped else OK
    if as_json:
        write_json("end", {**asdict(state), "exit_code": code})
        return code
    text = f"{state.images} images ({state.tokens} tokens) encoded into {output}"
    if state.resumed:
        text += f", {state.resumed} were there already"
    if state.skipped:
        text += f", {state.skipped} skipped: see {output}/errors-*.jsonl"
    if summary.interrupted:
        text += "; interrupted, the same command carries on"
    print(text)
    return code


def _limit_image_size(pixels: int | None) -> None:
    from PIL import Image

    if pixels is None:
        return
    if pixels < 0:
        raise ValueError(f"--max-image-pixels must not be negative, got {pixels}")
    # Pillow warns past its limit and refuses past twice its limit.
    Image.MAX_IMAGE_PIXELS = max(pixels // 2, 1) if pixels else None
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def _add_extract(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_extract)
    parser.description = "Write the vision tower alone: config, preprocessor, one safetensors file."
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--overwrite", action="store_true", help="replace the files in DIR")


def _extract(args: argparse.Namespace) -> int:
    from vitrt.checkpoint.extract import extract_tower

    checkpoint = _open(args)
    folder = extract_tower(checkpoint, args.output, overwrite=args.overwrite)
    print(f"{len(checkpoint.tensors)} tensors, {checkpoint.num_bytes / 1e6:.1f} MB in {folder}")
    return OK


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_info)
    parser.description = (
        "Family, size, cost by image size, and the attention backends that can run."
    )
    _add_runtime(parser)


def _info(args: argparse.Namespace) -> int:
    from vitrt.commands.info import describe

    for line in describe(_open(args, weights=False), _runtime(args)):
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
        "--layers", type=_layers, default=(), metavar="N,N,...", help="and after these layers"
    )
    _add_runtime(parser)


def _show(args: argparse.Namespace) -> int:
    from vitrt.commands.show import check_output, show
    from vitrt.encoder import VisionEncoder

    check_output(args.output)
    runtime = _runtime(args, cuda_graphs=False)
    encoder = VisionEncoder.from_checkpoint(_open(args), runtime)
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
    _add_runtime(parser)


def _verify(args: argparse.Namespace) -> int:
    from vitrt.commands.verify import choose_images, verify
    from vitrt.commands.verify_table import report

    images = choose_images(args.inputs, args.most_images)
    result = verify(_open(args), _runtime(args), images)
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


def _open(args: argparse.Namespace, *, weights: bool = True) -> Any:
    from vitrt.weights import open_checkpoint

    return open_checkpoint(
        args.model,
        revision=args.revision,
        cache_dir=args.cache_dir,
        local_files_only=args.local_files_only,
        weights=weights,
    )


def _runtime(args: argparse.Namespace, **more: Any) -> RuntimeConfig:
    return RuntimeConfig(
        device=args.device,
        dtype=args.dtype,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
        **more,
    )
