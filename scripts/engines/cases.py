"""The prompts that transformers and an engine are asked, and what transformers answers in float32.

    python cases.py WORK FAMILY SIZE DEVICE    # makes the checkpoint WORK/FAMILY-SIZE and answers

A prompt is text, `<vision>` placeholders and a tail; its answers are 16 greedy tokens and the
log-probabilities of the tail's tokens and of those 16, under the reference's tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

NEW_TOKENS = 16
TAIL = (
    "Say what you see, one thing after the other, and where it is; then what you do not see there."
)
_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
_SIZES = {"one": [(224, 320)], "three": [(160, 256), (320, 192), (96, 448)]}
_CLIP_SIZE = (128, 160)
# What an engine can be told: a clip with its times and all of its frames, or frames alone.
CASES = {"vllm": (*_SIZES, "clip"), "sglang": (*_SIZES, "frames")}
FRAMES = 8
FPS = 2.0
UNKNOWN_FPS = 24.0  # what Qwen2.5-VL's processor takes where it is told none


def by_frame(folder: Path) -> bool:
    """Whether a clip is given with its times, one placeholder a frame: Qwen3-VL and later."""
    return folder.name.startswith("qwen3")


def prompt_text(case: str) -> str:
    return "Look: " + (_IMAGE * len(_SIZES[case]) if case in _SIZES else _VIDEO) + TAIL


def random_image(height: int, width: int, seed: int) -> np.ndarray:
    """uint8 [height, width, 3]: blocks of 16 pixels, so that a resize keeps what is in it."""
    blocks = np.random.default_rng(seed).integers(
        0, 256, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8
    )
    return np.ascontiguousarray(blocks.repeat(16, 0).repeat(16, 1)[:height, :width])


def images_of(case: str) -> list[Image.Image]:
    return [
        Image.fromarray(random_image(height, width, seed))
        for seed, (height, width) in enumerate(_SIZES[case])
    ]


def clip_frames() -> np.ndarray:
    """uint8 [FRAMES, height, width, 3]."""
    return np.stack([random_image(*_CLIP_SIZE, 100 + index) for index in range(FRAMES)])


def clip_metadata() -> dict[str, Any]:
    return {
        "fps": FPS,
        "duration": FRAMES / FPS,
        "total_num_frames": FRAMES,
        "frames_indices": list(range(FRAMES)),
        "video_backend": "opencv",
    }


@torch.inference_mode()
def reference(folder: Path, device: str) -> dict[str, dict[str, Any]]:
    """Per case: `tokens`, and `logprobs` of the tail and of the tokens; transformers, float32."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model = model.to(device).eval()
    model.generation_config.eos_token_id = None
    answers = {}
    for case in (*_SIZES, "clip", "frames"):
        given: dict[str, Any]
        if case in _SIZES:
            given = {"images": images_of(case)}
        else:
            given = {"videos": [clip_frames()]}
        if case == "clip":
            given["do_sample_frames"] = False
            if by_frame(folder):  # vLLM takes none for Qwen2.5-VL
                given["video_metadata"] = [clip_metadata()]
        inputs = processor(text=[prompt_text(case)], return_tensors="pt", **given).to(device)
        ids = inputs["input_ids"][0]
        tail = len(processor.tokenizer.encode(TAIL))
        logits = model(**inputs).logits[0, -tail - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, ids[-tail:, None])[:, 0].tolist()
        made = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = made.sequences[0, len(ids) :].tolist()
        scores = [score[0].log_softmax(-1) for score in made.logits]
        logprobs += [float(score[token]) for score, token in zip(scores, tokens, strict=True)]
        answers[case] = {"tokens": tokens, "logprobs": logprobs, "prompt_tokens": len(ids)}
    return answers


if __name__ == "__main__":
    from checkpoints import make_checkpoint

    work, family, size, device = sys.argv[1:]
    made = make_checkpoint(Path(work, f"{family}-{size}"), family, size, device)
    torch.cuda.empty_cache()
    (made / "reference.json").write_text(json.dumps(reference(made, device)))
