"""Encode images with vitrt, then let transformers' language model talk about them.

    python examples/feed_transformers.py Qwen/Qwen3-VL-2B-Instruct cat.jpg dog.jpg

Features may come from anywhere: another process, a `FeatureStore`, last week. To speed up a model
that keeps getting pixels, `vitrt.integrations.transformers.accelerate(model)` is all it takes.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from vitrt import VisionEncoder
from vitrt.integrations.transformers import accept_features, feature_inputs, placeholder_inputs


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint folder or a hub id")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--prompt", default="What differs between these images?")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args = parser.parse_args(arguments)

    features = VisionEncoder.from_pretrained(args.model).encode(args.images)

    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    accept_features(model)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    content = [{"type": "image"} for _ in features] + [{"type": "text", "text": args.prompt}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    # The template leaves one placeholder an image; the model wants one for each merged token.
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    inputs = placeholder_inputs(model.config, ids, features) | feature_inputs(features)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
