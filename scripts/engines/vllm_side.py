"""One vLLM engine in this process: answers, or times, one checkpoint and writes them as JSON.

    python vllm_side.py answers|times|ec FOLDER RESULT.json

Whether the tower is vitrt's is decided as for any user, by VLLM_PLUGINS. `vllm_check.py` starts it.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine, and its model, in this process

import cases
import numpy as np
import torch
from PIL import Image

CUDA = torch.cuda.is_available()
# The workloads of the tower, as the side of each image in merged tokens; "mixed": 16 images.
TOWER_LOADS = {
    "1 of 560x560": None,
    "32 of 560x560": None,
    "mixed": [(1, 2 * (8 + i), 2 * (20 - i)) for i in range(16)],
}


def start(folder: Path, **options: Any) -> Any:
    from vllm import LLM

    with suppress(ImportError):
        # Where CuTe is installed, vLLM compiles router products of other models for minutes.
        from vllm.model_executor.kernels.linear.cute_dsl import ll_bf16

        ll_bf16._cutedsl_available = False
    return LLM(
        str(folder),
        dtype="bfloat16" if CUDA else "float32",
        enforce_eager=True,
        max_num_seqs=8,
        max_num_batched_tokens=8192,
        limit_mm_per_prompt={"image": 4, "video": 1},
        enable_mm_embeds=True,
        seed=0,
        **options,
    )


def small(folder: Path, **options: Any) -> Any:
    """An engine that leaves the card to its neighbours."""
    memory = {"kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.1} if CUDA else {}
    return start(folder, max_model_len=4096, skip_mm_profiling=True, **memory, **options)


def tower_name(llm: Any) -> str:
    return llm.apply_model(lambda model: type(model.visual).__module__)[0]


def pixels_data(folder: Path, case: str) -> dict[str, Any]:
    if case != "clip":
        return {"image": cases.images_of(case)}
    if "qwen3_vl" in folder.name:
        metadata = cases.clip_metadata() | {"do_sample_frames": False}
        return {"video": [(cases.clip_frames(), metadata)]}
    return {"video": [cases.clip_frames()]}


def features_of(folder: Path, case: str) -> list[Any]:
    from vitrt import VisionEncoder

    # vLLM's processor resizes as torchvision does.
    encoder = VisionEncoder.from_pretrained(folder, resize="torch")
    return encoder.encode([cases.clip_frames()] if case == "clip" else cases.images_of(case))


def features_data(folder: Path, case: str) -> dict[str, Any]:
    from vitrt.integrations.serving import for_vllm

    features = features_of(folder, case)
    if case != "clip":
        return for_vllm(features)
    times = [(2 * index + 0.5) / cases.FPS for index in range(features[0].grid_thw[0])]
    if "qwen3_vl" in folder.name:
        return for_vllm(videos=features, timestamps=[times])
    return for_vllm(videos=features, second_per_grid_ts=[2 / cases.UNKNOWN_FPS])


def ask(llm: Any, prompts: list[dict[str, Any]], **options: Any) -> list[Any]:
    from vllm import SamplingParams

    options = {"temperature": 0, "ignore_eos": True} | options
    return llm.generate(prompts, SamplingParams(**options), use_tqdm=False)


def answer(llm: Any, data: dict[str, dict[str, Any]], expected: dict[str, Any]) -> dict[str, Any]:
    """Per case its greedy tokens, and the log-probabilities of the reference's."""
    tokenizer = llm.get_tokenizer()
    names = list(data)
    plain = [{"prompt": cases.prompt_text(n), "multi_modal_data": data[n]} for n in names]
    forced = [
        {
            "prompt_token_ids": tokenizer.encode(cases.prompt_text(n)) + expected[n]["tokens"],
            "multi_modal_data": data[n],
        }
        for n in names
    ]
    free = ask(llm, plain, max_tokens=cases.NEW_TOKENS)  # all in one step
    again = ask(llm, plain[:1], max_tokens=cases.NEW_TOKENS)  # from the prefix cache
    scored = ask(llm, forced, max_tokens=1, prompt_logprobs=0)
    answers = {}
    for name, output, score in zip(names, free, scored, strict=True):
        last = len(expected[name]["logprobs"])
        pairs = zip(score.prompt_token_ids[-last:], score.prompt_logprobs[-last:], strict=True)
        answers[name] = {
            "tokens": list(output.outputs[0].token_ids),
            "prompt_tokens": len(output.prompt_token_ids),
            "logprobs": [step[token].logprob for token, step in pairs],
        }
    answers["again"] = {"tokens": list(again[0].outputs[0].token_ids)}
    return answers


def answers(folder: Path, result: dict[str, Any]) -> None:
    expected = json.loads(Path(folder, "reference.json").read_text())
    llm = small(folder)
    result["tower"] = tower_name(llm)
    names = cases.case_names()
    result["pixels"] = answer(llm, {n: pixels_data(folder, n) for n in names}, expected)
    if result["tower"].startswith("vitrt"):
        try:
            data = {n: features_data(folder, n) for n in names}
            result["features"] = answer(llm, data, expected)
        except Exception as error:
            result["features_error"] = repr(error)[:2000]


def times(folder: Path, result: dict[str, Any]) -> None:
    started = time.perf_counter()
    llm = start(folder, max_model_len=16384, gpu_memory_utilization=0.6 if CUDA else 0.3)
    result["seconds_to_start"] = time.perf_counter() - started
    result["tower"] = tower_name(llm)
    expected = Path(folder, "reference.json")
    if expected.exists():
        data = {n: pixels_data(folder, n) for n in cases.case_names()}
        result["pixels"] = answer(llm, data, json.loads(expected.read_text()))
    result["tower_ms"] = llm.apply_model(time_tower)[0]
    result["first_token_ms"] = first_token(llm)
    result["peak_gib"] = torch.cuda.max_memory_reserved() / 2**30 if CUDA else 0.0


@torch.inference_mode()
def time_tower(model: torch.nn.Module) -> dict[str, float]:
    """Median wall milliseconds of the tower's forward, as the engine calls it."""
    visual: Any = model.visual
    patches = 14 if "2_5" in type(model).__name__ else 16
    width = 3 * 2 * patches**2
    side = -(-560 // (2 * patches)) * 2
    found = {}
    for name, grids in TOWER_LOADS.items():
        count = int(name.split()[0]) if grids is None else 0
        grids = [list(g) for g in grids or [(1, side, side)] * count]
        x = torch.randn(sum(h * w for _, h, w in grids), width, device=visual.device)
        x = x.to(visual.dtype)
        grid_thw: Any = grids if patches == 14 else torch.tensor(grids)
        runs = []
        for _ in range(15 if CUDA else 1):
            begin = time.perf_counter()
            visual(x, grid_thw=grid_thw)
            if CUDA:
                torch.cuda.synchronize()
            runs.append((time.perf_counter() - begin) * 1e3)
        found[name] = statistics.median(runs[5:] or runs)
    return found


def first_token(llm: Any) -> float:
    """Median milliseconds from a prompt with a new 560x560 image to its first token."""
    runs = []
    for seed in range(15 if CUDA else 2):
        image = Image.fromarray(cases.random_image(560, 560, 1000 + seed))
        prompt = {"prompt": cases.prompt_text("one"), "multi_modal_data": {"image": [image]}}
        begin = time.perf_counter()
        ask(llm, [prompt], max_tokens=1)
        runs.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(runs[len(runs) // 3 :])


def ec(folder: Path, result: dict[str, Any]) -> None:
    """Features from a folder, under a black image: the answer must be the real image's."""
    from vllm.config import ECTransferConfig

    from vitrt.integrations.vllm import fill_ec_cache

    with tempfile.TemporaryDirectory() as cache:
        config = ECTransferConfig(
            ec_connector="ECExampleConnector",
            ec_role="ec_consumer",
            ec_connector_extra_config={"shared_storage_path": cache},
        )
        fill_ec_cache(cache, {"known": features_of(folder, "one")[0]})
        llm = small(folder, ec_transfer_config=config)
        black = Image.fromarray(np.zeros_like(np.asarray(cases.images_of("one")[0])))
        for name, uuid in (("known", "known"), ("unknown", "unknown")):
            prompt = {
                "prompt": cases.prompt_text("one"),
                "multi_modal_data": {"image": [black]},
                "multi_modal_uuids": {"image": [uuid]},
            }
            made = ask(llm, [prompt], max_tokens=cases.NEW_TOKENS)
            result[name] = list(made[0].outputs[0].token_ids)


if __name__ == "__main__":
    job, checkpoint, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    report: dict[str, Any] = {}
    {"answers": answers, "times": times, "ec": ec}[job](checkpoint, report)
    target.write_text(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)  # an engine's threads may outlive it
