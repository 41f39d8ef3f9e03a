"""Encode a folder once, and keep for each image what a vLLM or SGLang request takes in its place.

    python examples/precompute_for_vllm.py Qwen/Qwen3-VL-2B-Instruct photos/ --output payloads/

A payload then goes into a request like this:

    llm = vllm.LLM(model, enable_mm_embeds=True)
    data = torch.load("payloads/cat.jpg.pt")["vllm"]
    llm.generate({"prompt": text_with_one_image_placeholder, "multi_modal_data": data})

    engine = sglang.Engine(model_path=model)
    data = torch.load("payloads/cat.jpg.pt")["sglang"]
    engine.generate(input_ids=ids_with_placeholders_repeated, image_data=[data])
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from vitrt import VisionEncoder
from vitrt.integrations.serving import for_sglang, for_vllm

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint folder or a hub id")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)

    encoder = VisionEncoder.from_pretrained(args.model)
    # A language model that is served in bfloat16 would round float32 features on arrival anyway.
    paths = sorted(path for path in args.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    for path, features in zip(paths, encoder.stream(paths), strict=True):
        payload = {"vllm": for_vllm([features]), "sglang": for_sglang([features])}
        target = args.output / f"{path.relative_to(args.folder)}.pt"
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(payload, target)
        rows, width = payload["vllm"]["image"]["image_embeds"].shape
        print(f"{target}: {rows} tokens of {width} values, grid {features.grid_thw}")


if __name__ == "__main__":
    main()
