"""SGLang's offline engine with vitrt's tower against SGLang's own, on random checkpoints.

    python scripts/engines/sglang_check.py --output DIR [--device cpu]
        [--only tiny,ranks,encoder,faults,full] [--families qwen3_vl,...] [--timeout SECONDS]
        [--json FILE]

"tiny": 16 greedy tokens of prompts with one image, three images and the frames of a clip: with the
plugin, without it (by SGLANG_PLUGINS), and from vitrt's features, each against transformers in
float32. "ranks": the same with two tensor-parallel ranks. "encoder": an encoder on its own
(--encoder-only) and an engine beside it (--language-only). "faults": checkpoints whose tower is not
whole must not start. "full": the towers of released sizes in front of two layers of language model:
the same answers, the tower's time inside the engine, and the time to a first token.

Needs sglang with what it pins. A CPU (`--device cpu`: all but "full", in float32) needs SGLang's
own build of `sgl_kernel`, or `scripts/engines/sglang_stub` on PYTHONPATH in its place: no
operator of it is called here. Where nothing can be installed, these are the packages to bring, the
whole of sglang's wheel among them (it looks for its headers), transformers as it pins it:

    accelerate aiohttp apache-tvm-ffi compressed-tensors dill einops fastapi gguf httpx2 ipython
    loguru msgspec nvidia-ml-py openai orjson partial-json-parser pillow psutil pybase64 pydantic
    python-multipart pyzmq requests scipy sentencepiece setproctitle sglang starlette tiktoken
    tokenizers torch torchvision transformers uvicorn uvloop xgrammar, and what these need;
    on a GPU sglang-kernel (sm90/common_ops, flash_ops), triton, flashinfer and nvcc, too
"""

from __future__ import annotations

from check import Check, Results, main
from sides import WITH, WITHOUT, Job, result_of


class SglangCheck(Check):
    engine = "sglang"

    def settings(self) -> dict[str, str]:
        return {"SGLANG_USE_CPU_ENGINE": "1"} if self.device == "cpu" else {}

    def encoder(self, family: str) -> Results:
        folder = self.folder(family, "tiny")
        jobs = [Job("one", folder, WITHOUT)]
        jobs += [Job(name, folder) for name in ("one", "tokenizer", "ranks", "replicas")]
        results: Results = {}
        for job in jobs:
            self.run([job], "sglang_encoder_side.py")
            name = job.name if job.side == WITH else f"{job.name}, {job.side}"
            found = result_of(job, self.output)
            results |= self.answers(job, name)
            kept = ("encoder_towers", "feature_errors", "encoded_requests")
            results[name] |= {key: found[key] for key in kept if key in found}
            print(f"{folder.name:18s} {name:16s}", *map(results[name].get, kept), flush=True)
        return results

    def faults(self, family: str) -> Results:
        results: Results = {}
        for fault in ("missing", "renamed", "doubled"):
            job = Job(fault, self.folder(family, "tiny"))
            self.run([job])
            found = result_of(job, self.output)
            if "tensor" in found:
                name = found["tensor"].partition("visual.")[2]
                lines = (self.output / f"{job.stem}.log").read_text(errors="replace").splitlines()
                said = [line.strip() for line in lines if name in line]
                found |= {"named": bool(said), "error": said[-1][:2000] if said else None}
            results[fault] = found
            print(f"{job.folder.name:18s} {fault:16s} {found}", flush=True)
        return results


if __name__ == "__main__":
    main(SglangCheck, __doc__.splitlines()[0])
