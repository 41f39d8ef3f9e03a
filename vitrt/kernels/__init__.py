"""Triton and CuTe kernels, each with its host function and its reference in PyTorch."""

__all__ = [
    "ahead",
    "disk_cache",
    "dispatch",
    "fa4_hopper",
    "flash_attention",
    "gemm",
    "gemm_fp8",
    "kept",
    "norm",
    "patchify",
    "persistent",
    "pos_embed",
    "rope",
    "segments",
    "short_attention",
    "tail_attention",
    "to_e4m3",
    "window_attention",
]
