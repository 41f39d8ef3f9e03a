"""One SGLang engine: answers of one checkpoint, times, or what a start says, as JSON.

    python sglang_side.py answers|data|weights|times|missing|renamed|doubled FOLDER RESULT.json

"data" and "weights": answers of two tensor-parallel ranks, with --mm-enable-dp-encoder or without.
"missing", "renamed", "doubled": start on a checkpoint whose tower is not whole. Whether the tower
is vitrt's is decided as for any user, by SGLANG_PLUGINS. ENGINE_OPTIONS may hold more arguments of
SGLang's Engine on a GPU, as JSON. `sglang_check.py` starts this.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cases
from checkpoints import faulty_checkpoint
from PIL import Image
from tower_times import CUDA, time_first_token

GREEDY = {"temperature": 0, "max_new_tokens": cases.NEW_TOKENS, "ignore_eos": True}


def start(folder: Path, result: dict[str, Any], **options: Any) -> Any:
    from sglang import Engine

    if CUDA:
        # Room beside another engine, and nothing compiled for two layers of language model.
        options |= {"mem_fraction_static": 0.6, "max_total_tokens": 65536}
        options |= {"attention_backend": "triton", "sampling_backend": "pytorch"}
        options |= json.loads(os.environ.get("ENGINE_OPTIONS", "{}"))
    else:
        options |= {"device": "cpu", "attention_backend": "torch_native", "max_total_tokens": 16384}
        options["mm_attention_backend"] = "sdpa"
    with tempfile.TemporaryDirectory() as reports:
        os.environ["TOWER_REPORT"] = reports
        begin = time.perf_counter()
        engine = Engine(
            model_path=str(folder),
            dtype="bfloat16" if CUDA else "float32",
            enable_multimodal=True,
            context_length=4096,
            max_running_requests=8,
            disable_cuda_graph=True,
            skip_server_warmup=True,
            random_seed=0,
            log_level="info",
            **options,
        )
        result["seconds_to_start"] = time.perf_counter() - begin
        found = [json.loads(file.read_text()) for file in Path(reports).iterdir()]
    result["tower"] = ", ".join(sorted({rank["tower"] for rank in found}))
    result["ranks"] = len(found)
    if "tower_ms" in found[0]:
        result["tower_ms"] = found[0]["tower_ms"]
    return engine


def pixels_data(case: str) -> dict[str, Any]:
    given = {"prompt": cases.prompt_text(case)}
    if case == "frames":
        return given | {"video_data": [cases.clip_frames()]}
    return given | {"image_data": cases.images_of(case)}


def features_data(folder: Path, case: str) -> dict[str, Any]:
    from transformers import AutoConfig, AutoTokenizer

    from vitrt import VisionEncoder
    from vitrt.integrations.serving import for_sglang
    from vitrt.integrations.transformers import placeholder_inputs

    # SGLang's processor resizes as torchvision does.
    encoder = VisionEncoder.from_pretrained(folder, resize="torch")
    features = encoder.encode(cases.images_of(case))
    ids = AutoTokenizer.from_pretrained(folder).encode(cases.prompt_text(case))
    text = placeholder_inputs(AutoConfig.from_pretrained(folder), ids, features)
    ids = text["input_ids"][0].tolist()
    return {"input_ids": ids, "image_data": [for_sglang(features, input_ids=ids)]}


def answer(engine: Any, given: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens, and log-probabilities for as long as the tokens are the reference's."""
    output = engine.generate(
        **given, sampling_params=GREEDY, return_logprob=True, logprob_start_len=0
    )
    meta = output["meta_info"]
    made = [(float(value), int(token)) for value, token, *_ in meta["output_token_logprobs"]]
    tail = len(expected["logprobs"]) - cases.NEW_TOKENS
    logprobs = [float(value) for value, *_ in meta["input_token_logprobs"][-tail:]]
    for (value, token), wanted in zip(made, expected["tokens"], strict=True):
        if token != wanted:
            break
        logprobs.append(value)
    tokens = [token for _, token in made]
    return {"tokens": tokens, "prompt_tokens": meta["prompt_tokens"], "logprobs": logprobs}


def answers(folder: Path, result: dict[str, Any], *, features: bool = False, **options: Any) -> Any:
    expected = json.loads((folder / "reference.json").read_text())
    engine = start(folder, result, **options)
    result["pixels"], refused = {}, {}
    for name in cases.CASES["sglang"]:
        try:
            result["pixels"][name] = answer(engine, pixels_data(name), expected[name])
        except Exception as error:  # not every version takes frames
            refused[name] = repr(error)[:500]
    result["pixels"]["again"] = answer(engine, pixels_data("one"), expected["one"])
    if refused:
        result["refused"] = refused
    if features and result["tower"].startswith("vitrt"):
        try:
            result["features"] = {
                name: answer(engine, features_data(folder, name), expected[name])
                for name in result["pixels"]
                if name not in ("frames", "again")
            }
        except Exception as error:
            result["features_error"] = repr(error)[:2000]
    return engine


def times(folder: Path, result: dict[str, Any], target: Path) -> None:
    os.environ["TOWER_TIMES"] = "1"
    engine = answers(folder, result)
    target.write_text(json.dumps(result | {"failed": "no time of a first token"}))

    def first(image: Image.Image) -> None:
        given = {"prompt": cases.prompt_text("one"), "image_data": [image]}
        engine.generate(**given, sampling_params=GREEDY | {"max_new_tokens": 1})

    result["first_token_ms"] = time_first_token(first)


def fault(folder: Path, result: dict[str, Any], kind: str, target: Path) -> None:
    """SGLang ends this process where a rank fails: what is known is written before."""
    with tempfile.TemporaryDirectory(dir=target.parent) as made:
        broken, result["tensor"] = faulty_checkpoint(folder, Path(made, kind), kind)
        target.write_text(json.dumps(result | {"started": False}))
        start(broken, result)
        result["started"] = True


if __name__ == "__main__":
    job, checkpoint, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    report: dict[str, Any] = {}
    if job in ("data", "weights"):
        if not CUDA:  # the cores of each rank
            os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
        answers(checkpoint, report, tp_size=2, mm_enable_dp_encoder=job == "data")
    elif job in ("missing", "renamed", "doubled"):
        fault(checkpoint, report, job, target)
    elif job == "times":
        times(checkpoint, report, target)
    else:
        answers(checkpoint, report, features=True)
    target.write_text(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)
