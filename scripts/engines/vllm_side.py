"""One vLLM engine in this process: answers of one checkpoint, or why it did not start, as JSON.

    python vllm_side.py answers|ec|data|weights|faults|times FOLDER RESULT.json

"data" and "weights" answer with two tensor-parallel ranks, by `mm_encoder_tp_mode`. Whether the
tower is vitrt's is decided as for any user, by VLLM_PLUGINS. `vllm_check.py` starts this.
"""

from __future__ import annotations

import json
import os
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
from checkpoints import faulty_checkpoint
from PIL import Image
from tower_times import CUDA, module_of_tower, time_first_token, time_tower


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
    """The module of the tower's class, on every rank."""
    return ", ".join(sorted(set(llm.apply_model(module_of_tower))))


def pixels_data(folder: Path, case: str) -> dict[str, Any]:
    if case != "clip":
        return {"image": cases.images_of(case)}
    # Qwen2.5-VL is told what its processor takes where, as the reference's, it is told nothing;
    # vLLM 0.26 drops it, 0.32 asks for it.
    fps = cases.FPS if cases.by_frame(folder) else cases.UNKNOWN_FPS
    metadata = cases.clip_metadata() | {"fps": fps, "do_sample_frames": False}
    return {"video": [(cases.clip_frames(), metadata)]}


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
    if cases.by_frame(folder):
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


def answers(folder: Path, result: dict[str, Any], **options: Any) -> None:
    expected = json.loads(Path(folder, "reference.json").read_text())
    llm = small(folder, **options)
    result["tower"] = tower_name(llm)
    names = cases.CASES["vllm"]
    result["pixels"] = answer(llm, {n: pixels_data(folder, n) for n in names}, expected)
    if result["tower"].startswith("vitrt") and not options:
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
    expected = json.loads(Path(folder, "reference.json").read_text())
    data = {name: pixels_data(folder, name) for name in cases.CASES["vllm"]}
    result["pixels"] = answer(llm, data, expected)

    def tower(model: Any) -> dict[str, float]:
        patches = 16 if cases.by_frame(folder) else 14
        return time_tower(model.visual, patches, lists="Qwen2_5" in type(model).__name__)

    result["tower_ms"] = llm.apply_model(tower)[0]

    def first(image: Image.Image) -> None:
        prompt = {"prompt": cases.prompt_text("one"), "multi_modal_data": {"image": [image]}}
        ask(llm, [prompt], max_tokens=1)

    result["first_token_ms"] = time_first_token(first)
    result["peak_gib"] = torch.cuda.max_memory_reserved() / 2**30 if CUDA else 0.0


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


def ranks(folder: Path, result: dict[str, Any], mode: str) -> None:
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions that go to the ranks
    answers(folder, result, tensor_parallel_size=2, mm_encoder_tp_mode=mode)


def faults(folder: Path, result: dict[str, Any]) -> None:
    """What the start says where a checkpoint's tower is not whole."""
    with tempfile.TemporaryDirectory() as made:
        for fault in ("missing", "renamed", "doubled"):
            broken, name = faulty_checkpoint(folder, Path(made, fault), fault)
            try:
                small(broken)
            except Exception as error:
                named = name.partition("visual.")[2] in str(error)
                result[fault] = {"tensor": name, "named": named, "error": str(error)[:2000]}
            else:
                result[fault] = {"tensor": name, "named": False, "error": "it started"}


if __name__ == "__main__":
    job, checkpoint, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    report: dict[str, Any] = {}
    if job in ("data", "weights"):
        ranks(checkpoint, report, job)
    else:
        jobs = {"answers": answers, "ec": ec, "faults": faults, "times": times}
        jobs[job](checkpoint, report)
    target.write_text(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)  # an engine's threads may outlive it
