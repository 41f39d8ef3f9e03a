"""The matrix products of the released towers, and what is tried for them on Hopper."""

from __future__ import annotations

from dataclasses import dataclass

from vitrt.kernels.gemm_table import Kind, Product

# Patches: powers of two, the benchmark's workloads (1296, 1600, 3080, 4000, 11040, 41472) and 64k.
ROWS = [64, 128, 256, 512, 768, 1024, 1296, 1600, 2048, 2560, 3080, 4000, 5120, 6144, 8192, 11040]
ROWS += [16384, 24576, 32768, 41472, 51200, 64000]
# A tile that divides the rows of one graph bucket into two full waves needs a third for the next:
# the products of a block are measured at the buckets themselves, up to where waves stop mattering.
BUCKETS = [192, 320, 384, 448, 640, 896, *range(1152, 2049, 64), *range(2176, 4097, 128)]
BUCKETS += [4608, 5632, 7168, 9216, 11264, 12288, 14336]
SHOWN = [256, 1344, 3200, 11040, 41472]

# Narrow tiles and no clusters for few rows, wide ones and pairs that share a load for many.
TILES = [
    "64x128p1x1",
    "64x192p1x1",
    "128x96p1x1",
    "128x128p1x1",
    "128x128p2x1",
    "128x160p1x1",
    "128x160p2x1",
    "128x192p1x1",
    "128x192p1x2",
    "128x192p2x1",
    "192x128p1x1",
    "192x128p1x2",
    "192x128p2x1",
    "128x256c1x1",
    "128x256c2x1",
    "256x128c1x1",
    "256x128c2x1",
    "256x160c1x1",
    "256x192c2x1",
]
SPLIT_TILES = ["128x128p1x1/2", "128x192p1x1/2", "128x192p1x1/4", "256x128c1x1/2"]
SPLIT_MAX_ROWS = 4000  # above, the narrow products have tiles enough


@dataclass(frozen=True)
class Layer:
    family: str
    name: str
    product: Product
    merge: int = 1  # patches to a row

    @property
    def rows(self) -> list[int]:
        """Numbers of patches to measure it at."""
        in_block = self.merge == 1 and self.name != "patch embed" and "small" not in self.name
        return sorted({*ROWS, *(BUCKETS if in_block else ())})

    @property
    def key(self) -> str:
        return f"{self.product.kind} {self.product.n} {self.product.k}"

    @classmethod
    def of(cls, family: str, name: str, kind: Kind, n: int, k: int, merge: int = 1) -> Layer:
        return cls(family, name, Product(kind, n, k), merge)


LAYERS = [  # the towers of the benchmark first: a time limit cuts from the end
    Layer.of("qwen3", "fc1", "gelu_tanh", 4304, 1152),
    Layer.of("qwen3", "fc2", "residual", 1152, 4304),
    Layer.of("qwen3", "qkv", "bias", 3456, 1152),
    Layer.of("qwen3", "proj", "residual", 1152, 1152),
    Layer.of("qwen2_5", "gate_up", "swiglu", 6912, 1280),
    Layer.of("qwen2_5", "down", "residual", 1280, 3456),
    Layer.of("qwen2_5", "qkv", "bias", 3840, 1280),
    Layer.of("qwen2_5", "proj", "residual", 1280, 1280),
    Layer.of("qwen3", "merger fc1", "gelu", 4608, 4608, 4),
    Layer.of("qwen3", "merger fc2", "bias", 4096, 4608, 4),
    Layer.of("qwen3", "patch embed", "bias", 1152, 1536),
    Layer.of("qwen2_5", "merger fc1", "gelu", 5120, 5120, 4),
    Layer.of("qwen2_5", "merger fc2 7B", "bias", 3584, 5120, 4),
    Layer.of("qwen3", "fc1 small", "gelu_tanh", 4096, 1024),
    Layer.of("qwen3", "fc2 small", "residual", 1024, 4096),
    Layer.of("qwen3", "qkv small", "bias", 3072, 1024),
    Layer.of("qwen3", "proj small", "residual", 1024, 1024),
    Layer.of("qwen3", "merger fc1 small", "gelu", 4096, 4096, 4),
    Layer.of("qwen3", "merger fc2 2B", "bias", 2048, 4096, 4),
    Layer.of("qwen3", "merger fc2 4B", "bias", 2560, 4096, 4),
    Layer.of("qwen3", "patch embed small", "bias", 1024, 1536),
    Layer.of("qwen3", "merger fc2 32B", "bias", 5120, 4608, 4),
    Layer.of("qwen3", "merger fc2 30B", "bias", 2048, 4608, 4),
    Layer.of("qwen2_5", "merger fc2 3B", "bias", 2048, 5120, 4),
    Layer.of("qwen2_5", "merger fc2 32B", "bias", 5120, 5120, 4),
    Layer.of("qwen2_5", "merger fc2 72B", "bias", 8192, 5120, 4),
    Layer.of("qwen2", "fc1", "quick_gelu", 5120, 1280),
    Layer.of("qwen2", "fc2", "residual", 1280, 5120),
    Layer.of("qwen2", "merger fc2 2B", "bias", 1536, 5120, 4),
    Layer.of("qwen3_5", "fc1 small", "gelu_tanh", 3072, 768),
    Layer.of("qwen3_5", "fc2 small", "residual", 768, 3072),
    Layer.of("qwen3_5", "qkv small", "bias", 2304, 768),
    Layer.of("qwen3_5", "proj small", "residual", 768, 768),
    Layer.of("qwen3_5", "merger fc1 small", "gelu", 3072, 3072, 4),
    Layer.of("qwen3_5", "merger fc2 0.8B", "bias", 1024, 3072, 4),
    Layer.of("qwen3_5", "patch embed small", "bias", 768, 1536),
]
