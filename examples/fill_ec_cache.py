"""Encode a folder once, into the folder from which vLLM takes features in place of running a tower.

    python examples/fill_ec_cache.py Qwen/Qwen3-VL-2B-Instruct photos/ --cache features/

    vllm serve Qwen/Qwen3-VL-2B-Instruct --ec-transfer-config '{"ec_role": "ec_consumer",
        "ec_connector": "ECExampleConnector",
        "ec_connector_extra_config": {"shared_storage_path": "features/"}}'

A request names a photo by the key that this prints, and sends any image of the same size with it:

    llm.generate({"prompt": text_with_one_image_placeholder,
                  "multi_modal_data": {"image": [Image.new("RGB", (width, height))]},
                  "multi_modal_uuids": {"image": [key]}})
"""

from __future__ import annotations

import argparse
from pathlib import Path
from urllib.parse import quote

from vitrt import VisionEncoder
from vitrt.integrations.vllm import fill_ec_cache

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint folder or a hub id")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    args = parser.parse_args(arguments)

    # "torch": as vLLM's own processor resizes.
    encoder = VisionEncoder.from_pretrained(args.model, resize="torch")
    paths = sorted(path for path in args.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    for path, features in zip(paths, encoder.stream(paths), strict=True):
        key = quote(str(path.relative_to(args.folder)), safe="")  # a key names a folder
        fill_ec_cache(args.cache, {key: features})
        print(f"{key}: {len(features.embeddings)} tokens")


if __name__ == "__main__":
    main()
