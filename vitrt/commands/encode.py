"""`vitrt encode` at its terminal: arguments, progress, the closing line, the exit code."""

from __future__ import annotations

import argparse
import logging
import warnings
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from vitrt.commands.console import FAILED, INTERRUPTED, OK, SKIPPED, graceful_interrupts, say_last
from vitrt.commands.options import (
    add_fields,
    add_model,
    add_runtime,
    from_args,
    open_model,
    path_of,
)
from vitrt.config import RuntimeConfig
from vitrt.job.options import EncodeOptions
from vitrt.messages import counted
from vitrt.sources.options import SourceOptions

if TYPE_CHECKING:
    from vitrt.job.encode import Summary
    from vitrt.job.ranks import Job
    from vitrt.job.stop import Stop
    from vitrt.sources.folder import FileFilter
    from vitrt.sources.inputs import Inputs

logger = logging.getLogger(__name__)


RUN = {
    "workers": "decoding threads",
    "shard_mib": "size of a shard",
    "pool": "mean: one row an image",
    "layers": "also keep the hidden states after these layers, from 0 or, as in --layers=-1, from "
    "the last",
    "merged": "--no-merged: keep hidden states only, and run no layer past the last of --layers",
    "on_error": "what a bad image does",
    "overwrite": "first remove the features that the folder holds (after an interrupt, carry on "
    "without it)",
    "warmup": "record CUDA graphs of all sizes before the first image",
}


SOURCES = {
    "all_files": "try every file of a folder or an archive as an image, whatever its suffix",
    "image_column": "of tables, if several hold bytes",
    "id_column": "of tables, in place of the numbers of rows",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Encode images into a folder of safetensors shards. Running the same command again "
        "encodes what is missing or has changed. Exit codes: 0 all encoded, 1 an error, 3 some "
        "images skipped (see errors-*.jsonl), 130 interrupted."
    )
    add_model(parser)
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="a folder, an image, a .tar, a Parquet file or dataset on disk, a URL of one of these "
        "(s3://, gs://, hf://, ...), or @list.txt",
    )
    parser.add_argument("--output", required=True, type=path_of, metavar="DIR")
    add_runtime(
        parser,
        attention="a backend of vitrt info",
        cuda_graphs="at every size or at none (default: where they pay)",
        resize="whose bicubic, bit for bit",
        max_batch_tokens="patches of one forward",
    )
    add_fields(parser, EncodeOptions, RUN)
    add_fields(parser, SourceOptions, SOURCES)
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


def run(args: argparse.Namespace) -> int:
    """Encode, or follow the rank that leads; the exit code."""
    from vitrt.engine.group import GroupError
    from vitrt.job.encode import follow_leader
    from vitrt.job.ranks import open_job
    from vitrt.job.stop import Stop
    from vitrt.parallel.watchdog import PeerFailedError
    from vitrt.sources.inputs import Inputs

    options, runtime = from_args(EncodeOptions, args), from_args(RuntimeConfig, args)
    inputs = Inputs(args.inputs, from_args(SourceOptions, args))
    _check_output(args)
    _limit_image_size(args.max_image_pixels)
    stop = Stop()
    try:
        with (
            graceful_interrupts(stop, as_json=args.log_json),
            open_job(args.tp, device=args.device, stop=stop, all_reduce=args.all_reduce) as job,
        ):
            if not job.is_first and not args.verbose:
                logging.getLogger("vitrt").setLevel(logging.WARNING)
            if job.follows:
                follow_leader(open_model(args), runtime, options, job.parallel)
                return OK
            summary = _encode(args, runtime, inputs, options, stop, job)
            # What the first rank says stands for all of them, so torchrun sees one exit code.
            return _conclude(summary, inputs.file_filter, args) if job.is_first else OK
    except PeerFailedError:
        return FAILED  # which rank and why was said when it was noticed
    except GroupError as error:
        logger.error("%s", error)
        return FAILED


def _encode(
    args: argparse.Namespace,
    runtime: RuntimeConfig,
    inputs: Inputs,
    options: EncodeOptions,
    stop: Stop,
    job: Job,
) -> Summary:
    """This rank's part of a run, its progress shown by the first one."""
    from vitrt.job.encode import encode_folder
    from vitrt.job.progress import Progress
    from vitrt.job.progress_display import ProgressDisplay, Style

    progress = Progress()
    style: Style = "none" if not job.is_first else "json" if args.log_json else "auto"
    with ProgressDisplay(progress, style, job.shared):
        return encode_folder(
            open_model(args),
            runtime,
            inputs,
            args.output,
            options,
            progress=progress,
            stop=stop,
            ranks=job.shared,
            parallel=job.parallel,
        )


def _conclude(summary: Summary, file_filter: FileFilter, args: argparse.Namespace) -> int:
    from vitrt.job.progress_display import write_json

    state, output = summary.state, args.output
    code = INTERRUPTED if summary.interrupted else SKIPPED if state.skipped else OK
    if args.log_json:
        write_json("end", {**asdict(state), "left_out": file_filter.left_out, "exit_code": code})
        return code
    images, tokens = counted(state.images, "image"), counted(state.tokens, "token")
    text = f"{images} ({tokens}) encoded into {output}"
    if state.replaced:
        text += f", {state.replaced} of them again, because their files had changed"
    if state.resumed:
        text += f", {state.resumed} {'was' if state.resumed == 1 else 'were'} there already"
    if state.skipped:
        text += f", {state.skipped} skipped: see {output}/errors-*.jsonl"
    if file_filter.left_out:
        text += f", {file_filter}"
    if summary.interrupted:
        again = "the same command carries on"
        if args.overwrite:  # which would first remove what there is
            again = "run it without --overwrite to carry on"
        text += f"; interrupted, {again}"
    say_last(text)
    return code


def _check_output(args: argparse.Namespace) -> None:
    """ValueError where --all-files would try the shards in the output folder as images."""
    output = args.output.resolve()
    for given in args.inputs if args.all_files else ():
        folder = Path(given).resolve()
        if not folder.is_dir() or not output.is_relative_to(folder):
            continue
        if not any(part.startswith(".") for part in output.relative_to(folder).parts):
            raise ValueError(
                f"--output {args.output} lies in INPUT {given}, of which --all-files tries every "
                "file: choose a folder elsewhere"
            )


def _limit_image_size(pixels: int | None) -> None:
    from PIL import Image

    if pixels is None:
        return
    if pixels < 0:
        raise ValueError(f"--max-image-pixels must not be negative, got {pixels}")
    # Pillow refuses past twice its limit: as a fraction, half of an odd number is exact, and twice
    # that a whole number in its message.
    Image.MAX_IMAGE_PIXELS = Fraction(pixels, 2) if pixels else None  # type: ignore[assignment]
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
