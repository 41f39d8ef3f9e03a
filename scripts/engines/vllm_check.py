"""vLLM's offline engine with vitrt's tower against vLLM's own, on random checkpoints.

    python scripts/engines/vllm_check.py --output DIR [--device cpu] [--only tiny,ranks,faults,full]
        [--families qwen3_vl,...] [--json FILE]

"tiny": 16 greedy tokens of prompts with one image, three images and a clip: with the plugin,
without it (VLLM_PLUGINS=), and from vitrt's features (`image_embeds`), each against transformers in
float32; and features through vLLM's file connector, where "known" must be the answer and "unknown"
must not. "ranks": the same with two tensor-parallel ranks. "faults": checkpoints whose tower is not
whole must not start. "full": the towers of released sizes in front of two layers of language model:
the same answers, the tower's time inside the engine, and the time to a first token.

Needs vllm and transformers. With a CPU build of vLLM (`--device cpu`) all but "full" runs without a
GPU, in float32, one engine after the other: minutes each.
"""

from __future__ import annotations

import os

from check import Check, Results, main
from sides import Job, result_of


class VllmCheck(Check):
    engine = "vllm"

    def settings(self) -> dict[str, str]:
        settings = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": str(self.output / "vllm-cache")}
        if self.device == "cpu":
            # On few cores, beside other work: bind none of them, and take little memory.
            given = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
            settings |= {name: os.environ.get(name, value) for name, value in given.items()}
        return settings

    def tiny(self, family: str) -> Results:
        results = super().tiny(family)
        job = Job("ec", self.folder(family, "tiny"))
        self.run([job])
        found = result_of(job, self.output)
        expected = self.expected(job.folder)["one"]["tokens"]
        same = {name: tokens == expected for name, tokens in found.items()}
        results["ec_folder"] = found if "failed" in found else same
        print(f"{job.folder.name:18s} EC folder        {results['ec_folder']}", flush=True)
        return results

    def faults(self, family: str) -> Results:
        job = Job("faults", self.folder(family, "tiny"))
        self.run([job])
        found = result_of(job, self.output)
        for fault, said in found.items():
            print(f"{job.folder.name:18s} {fault:16s} {said}", flush=True)
        return found


if __name__ == "__main__":
    main(VllmCheck, __doc__.splitlines()[0])
