"""Parts of our own in FlashAttention-4's Hopper kernel: a lazy maximum, and persistent blocks.

Copies of the package's module of that kernel have another softmax and, for persistent blocks,
another scheduler and another way to write the output; its own stays as it is. On an H200 that is 2%
to 14% faster at head sizes of 72 and 80 (scripts/results/README.md).

Importing this imports flash-attn-4 and CUTLASS, which takes seconds: only attention/fa4.py does.

Legend: R rows a thread holds, N keys of a block, Dh head size.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any
from warnings import catch_warnings, filterwarnings

import cutlass
from cutlass import Float32, Int32, const_expr, cute
from flash_attn.cute import flash_fwd_sm90, interface, utils
from flash_attn.cute.cache_utils import get_jit_cache
from flash_attn.cute.softmax import Softmax
from flash_attn.cute.tile_scheduler import SingleTileVarlenScheduler
from quack import layout_utils

from vitrt.kernels.dispatch import NotCompiledError

# A score may pass the maximum of its row that is kept by 2^8 before output and sum are scaled down:
# in bfloat16 and float16 exponentials lose nothing by it, and sums are in float32.
_HEADROOM = 8.0

_compiling = threading.Lock()  # the compiler does not say that two threads may use it at once


@cute.jit
def follow(
    gaps: cute.Tensor, row_max: cute.Tensor, row_sum: cute.Tensor, row_scale: cute.Tensor
) -> None:
    """Raise the maxima [R] of those rows whose scores pass theirs by more than the headroom.

    By the row alone: what is in other rows of the block must not change a bit of it.
    """
    for r in cutlass.range_constexpr(cute.size(row_max)):
        gap = cute.arch.warp_reduction_max(gaps[r], threads_in_group=4)
        gap = gap if gap > _HEADROOM else Float32(0.0)
        row_max[r] = row_max[r] + gap
        row_scale[r] = cute.math.exp2(-gap, fastmath=True)
        row_sum[r] = row_sum[r] * row_scale[r]


class LazySoftmax(Softmax):  # type: ignore[misc]  # the package has no types
    """The package's online softmax, with a maximum that is only raised where scores pass it by far.

    Any number near the maximum gives the same quotient, as long as nothing overflows; on Blackwell
    the package does the like. `row_max` [R] is multiplied by `scale_log2` already.
    """

    @staticmethod
    def create(
        scale_log2: Float32,
        num_rows: cutlass.Constexpr[int],
        arch: cutlass.Constexpr[int] = 80,
        softmax_scale: Float32 | None = None,
    ) -> LazySoftmax:
        row_max, row_sum = (cute.make_rmem_tensor(num_rows, Float32) for _ in range(2))
        return LazySoftmax(scale_log2, num_rows, row_max, row_sum, arch, softmax_scale)

    @cute.jit
    def online_softmax(
        self,
        acc_S: cute.Tensor,
        is_first: cutlass.Constexpr[bool] = False,
        check_inf: cutlass.Constexpr[bool] = True,
    ) -> cute.Tensor:
        """exp2 of the scores of N keys, in place; returns what the output is to be scaled by."""
        scores = layout_utils.reshape_acc_to_mn(acc_S)
        row_max, row_sum, scale = self.row_max, self.row_sum, self.scale_log2
        rows = const_expr(cute.size(row_max))
        row_scale = cute.make_fragment_like(row_max, Float32)
        gaps = cute.make_fragment_like(row_max, Float32)
        for r in cutlass.range_constexpr(rows):
            gaps[r] = utils.fmax_reduce(scores[r, None].load(), None, arch=self.arch) * scale
            row_scale[r] = 1.0
        if const_expr(is_first):
            for r in cutlass.range_constexpr(rows):
                top = cute.arch.warp_reduction_max(gaps[r], threads_in_group=4)
                row_max[r] = Float32(0.0) if top == -Float32.inf else top
                row_sum[r] = 0.0
        else:
            for r in cutlass.range_constexpr(rows):
                gaps[r] = gaps[r] - row_max[r]
            if cute.arch.vote_any_sync(cute.arch.fmax(gaps[0], gaps[rows - 1]) > _HEADROOM):
                follow(gaps, row_max, row_sum, row_scale)
        for r in cutlass.range_constexpr(rows):
            for i in cutlass.range_constexpr(cute.size(scores, mode=[1])):
                scores[r, i] = cute.math.exp2(scores[r, i] * scale - row_max[r], fastmath=True)
            row_sum[r] = utils.fadd_reduce(
                scores[r, None].load(), init_val=row_sum[r], arch=self.arch
            )
        return row_scale

    @cute.jit
    def rescale_O(  # noqa: N802 (the package's name)
        self, acc_O: cute.Tensor, row_scale: cute.Tensor
    ) -> None:
        out = layout_utils.reshape_acc_to_mn(acc_O)
        rows = const_expr(cute.size(row_scale))
        changed = (row_scale[0] != 1.0) | (row_scale[rows - 1] != 1.0)
        if cute.arch.vote_any_sync(changed):
            for r in cutlass.range_constexpr(rows):
                out[r, None].store(out[r, None].load() * row_scale[r])


def persistent_scheduler(processors: int) -> type[SingleTileVarlenScheduler]:
    """One block on each processor, which takes every `processors`-th tile."""

    class Persistent(SingleTileVarlenScheduler):  # type: ignore[misc]
        @staticmethod
        def create(params: Any, ctx: Any = None, *, loc: Any = None, ip: Any = None) -> Persistent:
            first, _, _ = cute.arch.block_idx()
            return Persistent(params, first, Int32(0), loc=loc, ip=ip)

        @staticmethod
        def get_grid_shape(params: Any, *, loc: Any = None, ip: Any = None) -> tuple[Any, ...]:
            blocks, _, _ = SingleTileVarlenScheduler.get_grid_shape(params)
            return (cutlass.min(blocks, Int32(processors)), Int32(1), Int32(1))

        def advance_to_next_work(self, *, loc: Any = None, ip: Any = None) -> None:
            step = cute.arch.grid_dim()[0]
            self._tile_idx = self._tile_idx + step  # type: ignore[has-type]

    return Persistent


class DirectOutput:
    """Writes the output from registers; to be mixed into the package's kernel.

    That passes it through the memory where Q lies, into which a persistent block already loads its
    next Q.
    """

    dtype: Any
    tile_m: int
    tile_hdimv: int

    use_tma_O = property(lambda self: False, lambda self, value: None)  # noqa: N815

    def __init__(self, dtype: Any, head_dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(dtype, head_dim, *args, **kwargs)  # type: ignore[call-arg]
        self.head_size = head_dim  # without padding

    @cute.jit
    def epilogue(
        self,
        acc_O: cute.Tensor,
        lse: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor | None,
        sO: cute.Tensor,
        seqlen: Any,
        gmem_tiled_copy_O: cute.TiledCopy,
        tma_atom_O: cute.CopyAtom | None,
        tiled_mma: cute.TiledMma,
        tidx: Int32,
        m_block: Int32,
        head_idx: Int32,
        batch_idx: Int32,
    ) -> None:
        result = cute.make_fragment_like(acc_O, self.dtype)
        result.store(acc_O.load().to(self.dtype))
        of_head = seqlen.offset_batch_Q(mO, batch_idx, dim=3)[None, None, head_idx]
        block = cute.local_tile(of_head, (self.tile_m, self.tile_hdimv), (m_block, 0))
        mine = tiled_mma.get_slice(tidx)
        target = layout_utils.reshape_acc_to_mn(mine.partition_C(block))
        places = cute.make_identity_tensor((self.tile_m, self.tile_hdimv))
        place = layout_utils.reshape_acc_to_mn(mine.partition_C(places))
        source = layout_utils.reshape_acc_to_mn(result)
        left = seqlen.seqlen_q - m_block * self.tile_m
        for r in cutlass.range_constexpr(cute.size(source, mode=[0])):
            if place[r, 0][0] < left:
                for i in cutlass.range_constexpr(0, cute.size(source, mode=[1]), 2):
                    if const_expr(i // 2 * 8 < self.head_size):  # 8 columns a quad of threads
                        pair = cute.make_rmem_tensor(2, self.dtype)
                        pair[0], pair[1] = source[r, i], source[r, i + 1]
                        words = cute.make_tensor(
                            utils.elem_pointer(target, (r, i)), cute.make_layout(2)
                        )
                        cute.autovec_copy(pair, words)


def _with_parts(name: str, **parts: Any) -> ModuleType:
    """A copy of the package's module of the kernel, in which our parts stand in for its own."""
    spec = spec_from_file_location(f"{flash_fwd_sm90.__name__}_{name}", flash_fwd_sm90.__file__)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where the compiler looks its text up
    spec.loader.exec_module(module)
    for part, ours in parts.items():
        getattr(module, part)  # AttributeError for a release that has no such part
        setattr(module, part, ours)
    return module


class _Cute:
    """CuTe as the package's forward sees it, but for what a failed compilation raises."""

    def __getattr__(self, name: str) -> Any:
        return getattr(cute, name)

    def compile(self, *args: Any, **kwargs: Any) -> Any:
        with _compiling, catch_warnings():
            # The package passes it itself, empty.
            filterwarnings("ignore", message="Argument aux_data")
            try:
                return cute.compile(*args, **kwargs)
            except Exception as error:  # of any kind, out of a compiler
                raise NotCompiledError(f"{type(error).__name__}: {error}"[:300]) from error


def forward(*, persistent: bool, processors: int) -> Callable[..., Any]:
    """The package's `_flash_attn_fwd`, whose kernels have our parts and caches of their own.

    `persistent` hands tiles out in a fixed order, to as many blocks as there are `processors`.
    NotCompiledError from a first call whose kernel does not compile.
    """
    kind = f"persistent-{processors}" if persistent else "lazy"
    parts: dict[str, Any] = {"Softmax": LazySoftmax}
    if persistent:
        parts["SingleTileVarlenScheduler"] = persistent_scheduler(processors)
    kernel = _with_parts(kind.replace("-", "_"), **parts).FlashAttentionForwardSm90
    if persistent:
        kernel = type("DirectOutput", (DirectOutput, kernel), {})
    theirs = interface._flash_attn_fwd
    scope = {**theirs.__globals__, "cute": _Cute(), "FlashAttentionForwardSm90": kernel}
    ours = FunctionType(
        theirs.__code__, scope, theirs.__name__, theirs.__defaults__, theirs.__closure__
    )
    ours.__kwdefaults__ = theirs.__kwdefaults__
    # The package's key holds its own text; ours, and what is compiled into a kernel, are in a name.
    text = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    vars(ours)["compile_cache"] = get_jit_cache(f"fwd-vitrt-{text}-{kind}")
    scope["_flash_attn_fwd"] = ours
    return ours
