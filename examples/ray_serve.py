"""Features over HTTP with Ray Serve: start the service, or ask it.

    python examples/ray_serve.py serve Qwen/Qwen3-VL-2B-Instruct --replicas 4
    python examples/ray_serve.py ask http://127.0.0.1:8000/ cat.jpg dog.jpg

Needs `pip install 'vitrt[ray]'`. An answer of 5xx says that a replica was lost or that too many
requests wait; whoever asks sends the image again, as `ask` does.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from vitrt.features import ImageFeatures
from vitrt.store.content import from_bytes


def encode(url: str, path: Path, *, tries: int = 60) -> ImageFeatures:
    """The features of one image. ValueError where the service refuses it."""
    for _ in range(tries):
        try:
            request = Request(f"{url}?{urlencode({'name': path.name})}", path.read_bytes())
            with urlopen(request) as response:
                return from_bytes(response.read())
        except HTTPError as error:
            if error.code < 500:
                raise ValueError(json.loads(error.read())["error"]) from None
        except URLError:
            pass
        time.sleep(1)
    raise ValueError(f"{path}: no answer in {tries} tries")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("serve")
    start.add_argument("model", help="a checkpoint folder or a hub id")
    start.add_argument("--replicas", type=int, default=1)
    start.add_argument("--gpus", type=float, default=1, help="of a replica; 0.5 shares one")
    ask = commands.add_parser("ask")
    ask.add_argument("url")
    ask.add_argument("images", type=Path, nargs="+")
    args = parser.parse_args(arguments)

    if args.command == "serve":
        from ray import serve

        from vitrt.integrations.ray_serve import EncoderService

        deployment = EncoderService.options(
            num_replicas=args.replicas, ray_actor_options={"num_gpus": args.gpus}
        )
        serve.run(deployment.bind(args.model), blocking=True)
        return
    for path in args.images:
        try:
            features = encode(args.url, path)
        except ValueError as error:
            print(f"{path}: {error}")
        else:
            print(f"{path}: {list(features.embeddings.shape)}, grid {features.grid_thw}")


if __name__ == "__main__":
    main()
