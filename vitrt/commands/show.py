"""`vitrt show`: a picture of an image's features."""

from __future__ import annotations

import argparse

from vitrt.commands.console import OK
from vitrt.commands.options import (
    add_model,
    add_runtime,
    layer_list,
    open_model,
    path_of,
    runtime_config,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Save the image beside the first three principal components, as colours, of its "
        "embeddings and of each deepstack level."
    )
    add_model(parser)
    # Text, as of a path a URL would lose a slash.
    parser.add_argument("image", metavar="IMAGE", help="a file, or a file: or data: URL")
    parser.add_argument("--output", required=True, type=path_of, metavar="PNG")
    parser.add_argument(
        "--layers", type=layer_list, default=(), metavar="N,N,...", help="and after these layers"
    )
    add_runtime(parser)


def run(args: argparse.Namespace) -> int:
    """Save the picture; 0. Raises ImageError, ValueError."""
    from vitrt.commands.feature_picture import check_output, save_picture
    from vitrt.encoder import VisionEncoder

    check_output(args.output, args.image)
    runtime = runtime_config(args, cuda_graphs=False)
    encoder = VisionEncoder.from_checkpoint(open_model(args), runtime)
    print(save_picture(encoder, args.image, args.output, layers=args.layers))
    return OK
