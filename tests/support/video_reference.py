"""transformers' own video processors, run apart: `run_video_processors` starts this file.

They need torchvision, of which vitrt's environment has none. Where it is missing this process, and
no other, has a module of its name with the five functions that the processors call; with it
installed, they call the real one.
"""

from __future__ import annotations

import enum
import importlib.machinery
import json
import os
import subprocess
import sys
import traceback
import types
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = {"frame": "Qwen2VLVideoProcessor", "clip": "Qwen3VLVideoProcessor"}


def run_video_processors(
    cases: Sequence[dict[str, Any]], clips: Sequence[np.ndarray], folder: Path
) -> list[dict[str, Any]]:
    """What transformers makes of each clip, uint8 [F, H, W, 3].

    A case holds `rule` and the `settings` of the processor, or the `folder` of a checkpoint, and
    where it is no array that counts but a video file, its `path`, or for sampling alone its `total`
    frames and `rate`. A result holds `grid`, `values`
    (pixel_values, float32), and the `rule` and `size` of the processor; of a file, the `indices` of
    the frames taken.
    """
    np.savez(folder / "clips.npz", *clips)
    (folder / "cases.json").write_text(json.dumps(list(cases)))
    process = _process()
    assert process.stdin is not None and process.stdout is not None
    print(folder, file=process.stdin, flush=True)
    problem = json.loads(process.stdout.readline() or '"its process ended"')
    assert problem is None, problem
    values = np.load(folder / "values.npz")
    results = json.loads((folder / "results.json").read_text())
    return [result | {"values": values[f"arr_{i}"]} for i, result in enumerate(results)]


@cache
def _process() -> subprocess.Popen[str]:
    """One for all tests here: its imports take longer than what they ask. It ends with them."""
    command = [sys.executable, __file__]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def _module(name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    module.__dict__.update(attributes)
    sys.modules[name] = module
    return module


class _Interpolation(enum.Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def _stand_in_for_torchvision() -> None:
    import torch

    def resize(image, size, interpolation, antialias):
        assert interpolation == _Interpolation.BICUBIC and antialias
        frames = image.reshape(-1, *image.shape[-3:])
        if frames.shape[-2:] != tuple(size):
            frames = torch.nn.functional.interpolate(
                frames, size=tuple(size), mode="bicubic", antialias=True
            )
        return frames.reshape(*image.shape[:-2], *size)

    def normalize(image, mean, std, inplace=False):
        mean, std = torch.as_tensor(mean), torch.as_tensor(std)
        return image.sub(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))

    functional = _module(
        "torchvision.transforms.v2.functional",
        resize=resize,
        normalize=normalize,
        grayscale_to_rgb=lambda video: video,
        InterpolationMode=_Interpolation,
    )
    v2 = _module("torchvision.transforms.v2", functional=functional)
    old = _module("torchvision.transforms.functional", pil_to_tensor=None)
    io = _module("torchvision.io", VideoReader=None)
    transforms = _module(
        "torchvision.transforms", v2=v2, functional=old, InterpolationMode=_Interpolation
    )
    _module("torchvision", transforms=transforms, io=io, __version__="0.20.0")


def _processor(case: dict[str, Any]) -> Any:
    import transformers

    if "folder" in case:
        return transformers.AutoVideoProcessor.from_pretrained(case["folder"])
    return getattr(transformers, CLASSES[case["rule"]])(**case["settings"])


def _sample(processor: Any, case: dict[str, Any], metadata: Any) -> list[int]:
    chosen = {"fps": processor.fps, "num_frames": processor.num_frames}
    if chosen["num_frames"] is not None:
        chosen["fps"] = None
    names = ("min_frames", "max_frames", "temporal_patch_size")
    more = {name: getattr(processor, name) for name in names}
    return [int(i) for i in processor.sample_frames(metadata=metadata, **chosen, **more)]


def _sampled_file(processor: Any, case: dict[str, Any]) -> tuple[np.ndarray, list[int]]:
    """The frames of a video file that the processor takes, read by transformers through PyAV."""
    from transformers.video_utils import load_video

    frames, metadata = load_video(
        case["path"],
        backend="pyav",
        sample_indices_fn=lambda metadata, **_: _sample(processor, case, metadata),
    )
    # Its reader gives a frame once, however often it was asked for.
    wanted = metadata.frames_indices
    places = {index: place for place, index in enumerate(dict.fromkeys(wanted))}
    return np.asarray(frames)[[places[index] for index in wanted]], wanted


def _run(folder: Path) -> None:
    cases = json.loads((folder / "cases.json").read_text())
    clips = np.load(folder / "clips.npz")
    results, values = [], []
    for index, case in enumerate(cases):
        processor = _processor(case)
        taken = None
        if "total" in case:
            metadata = {"total_num_frames": case["total"], "fps": case["rate"]}
            taken = _sample(processor, case, types.SimpleNamespace(**metadata))
            results.append({"indices": taken})
            values.append(np.zeros(0))
            continue
        if "path" in case:
            clip, taken = _sampled_file(processor, case)
        else:
            clip = clips[f"arr_{index}"]
        features = processor(
            videos=[clip],
            do_sample_frames=False,
            input_data_format="channels_last",
            return_tensors="pt",
        )
        size = {key: processor.size[key] for key in ("shortest_edge", "longest_edge")}
        rule = {name: rule for rule, name in CLASSES.items()}[type(processor).__name__]
        grid = features["video_grid_thw"][0].tolist()
        results.append({"grid": grid, "rule": rule, "size": size, "indices": taken})
        values.append(features["pixel_values_videos"].numpy())
    np.savez(folder / "values.npz", *values)
    (folder / "results.json").write_text(json.dumps(results))


def _serve() -> None:
    """Answer each folder on standard input with a line: null, or what went wrong, as JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not get between the answers
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        _stand_in_for_torchvision()
    for line in sys.stdin:
        problem = None
        try:
            _run(Path(line.removesuffix("\n")))
        except Exception:
            problem = traceback.format_exc()
        print(json.dumps(problem), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
