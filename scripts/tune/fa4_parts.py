"""Parts of our own for FlashAttention-4's Hopper kernel, put in its place while it compiles.

The package's kernel stays as it is but for what a `Variant` names: the softmax, how blocks are
handed out, how the output is written and how wide p v is. For release 4.0.0b36 alone.

Legend: R rows a thread holds, N keys of a block, Dh head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import cutlass
from cutlass import Float32, Int32, const_expr, cute
from cutlass.cute.nvgpu import warpgroup
from fa4_variants import Variant
from flash_attn.cute import flash_fwd_sm90, interface, utils
from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90
from flash_attn.cute.softmax import Softmax
from flash_attn.cute.tile_scheduler import SingleTileVarlenScheduler
from quack import layout_utils, sm90_utils

# A score may pass the maximum of its row that is kept by 2^8 before output and sum are scaled down.
_HEADROOM = 8.0
_ROUNDER = float(3 << 22)  # added to a float32 below 2^22 it leaves the nearest integer in its bits
# 2^f over -1/2 <= f <= 1/2, of least relative error (7.5e-5): 1/26 of what bfloat16 rounds by.
_EXP2 = (0.9999280571937561, 0.6932609677314758, 0.2426111251115799, 0.0551716685295105)


@cute.jit
def to_integer(x: Float32) -> Float32:
    return (x + _ROUNDER) - _ROUNDER


@cute.jit
def follow(
    tops: cute.Tensor,
    row_max: cute.Tensor,
    row_sum: cute.Tensor,
    row_scale: cute.Tensor,
    scale: Float32,
) -> None:
    """Let the maxima [R] of rows that were passed by half the headroom follow."""
    for r in cutlass.range_constexpr(cute.size(row_max)):
        top = cute.arch.warp_reduction_max(tops[r], threads_in_group=4)
        old = row_max[r]
        new = to_integer(top * scale)
        new = new if new - old > _HEADROOM / 2 else old
        row_max[r] = new
        row_scale[r] = cute.math.exp2(old - new, fastmath=True)
        row_sum[r] = row_sum[r] * row_scale[r]


@cute.jit
def exp2_by_polynomial(score: Float32, scale: Float32, row_max: Float32) -> Float32:
    """exp2(score * scale - row_max), without the special units."""
    start = _ROUNDER - row_max
    rounded = cute.arch.fmax(score * scale + start, Float32(_ROUNDER - 126.0))
    rest = score * scale + (start - rounded)
    power = ((_EXP2[3] * rest + _EXP2[2]) * rest + _EXP2[1]) * rest + _EXP2[0]
    return utils.combine_int_frac_ex2(rounded, power)


def softmax_class(poly: int) -> type[Softmax]:
    """The package's softmax, with a maximum that follows only where the scores pass it by far.

    `row_max` [R] is an integer and already times `scale_log2`, so that rescaling is exact and
    exp2(s * scale_log2 - row_max) needs no third operation where it is a polynomial.
    """

    class Lazy(Softmax):
        every = poly

        @staticmethod
        def create(
            scale_log2: Float32,
            num_rows: cutlass.Constexpr[int],
            arch: cutlass.Constexpr[int] = 80,
            softmax_scale: Float32 | None = None,
        ) -> Lazy:
            row_max, row_sum = (cute.make_rmem_tensor(num_rows, Float32) for _ in range(2))
            return Lazy(scale_log2, num_rows, row_max, row_sum, arch, softmax_scale)

        @cute.jit
        def online_softmax(
            self,
            acc_S: cute.Tensor,
            is_first: cutlass.Constexpr[bool] = False,
            check_inf: cutlass.Constexpr[bool] = True,
        ) -> cute.Tensor:
            scores = layout_utils.reshape_acc_to_mn(acc_S)
            row_max, row_sum, scale = self.row_max, self.row_sum, self.scale_log2
            rows = const_expr(cute.size(row_max))
            row_scale = cute.make_fragment_like(row_max, Float32)
            tops = cute.make_fragment_like(row_max, Float32)
            for r in cutlass.range_constexpr(rows):
                tops[r] = utils.fmax_reduce(scores[r, None].load(), None, arch=self.arch)
                row_scale[r] = 1.0
            if const_expr(is_first):
                for r in cutlass.range_constexpr(rows):
                    top = cute.arch.warp_reduction_max(tops[r], threads_in_group=4)
                    row_max[r] = to_integer(0.0 if top == -Float32.inf else top * scale)
                    row_sum[r] = 0.0
            else:
                above = cute.arch.fmax(
                    tops[0] * scale - row_max[0], tops[rows - 1] * scale - row_max[rows - 1]
                )
                if cute.arch.vote_any_sync(above > _HEADROOM):
                    follow(tops, row_max, row_sum, row_scale, scale)
            for r in cutlass.range_constexpr(rows):
                for i in cutlass.range_constexpr(cute.size(scores, mode=[1])):
                    if const_expr(self.every > 0 and i % max(self.every, 1) == 1 and not is_first):
                        scores[r, i] = exp2_by_polynomial(scores[r, i], scale, row_max[r])
                    else:
                        scores[r, i] = cute.math.exp2(
                            scores[r, i] * scale - row_max[r], fastmath=True
                        )
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

    return Lazy


def scheduler_class(processors: int) -> type[SingleTileVarlenScheduler]:
    """One block a processor, which takes every `processors`-th tile."""

    class Persistent(SingleTileVarlenScheduler):
        @staticmethod
        def create(params: Any, ctx: Any = None, *, loc: Any = None, ip: Any = None) -> Persistent:
            first, _, _ = cute.arch.block_idx()
            return Persistent(params, first, Int32(0), loc=loc, ip=ip)

        @staticmethod
        def get_grid_shape(params: Any, *, loc: Any = None, ip: Any = None) -> tuple[Any, ...]:
            blocks, _, _ = SingleTileVarlenScheduler.get_grid_shape(params)
            return (cutlass.min(blocks, Int32(processors)), Int32(1), Int32(1))

        def advance_to_next_work(self, *, loc: Any = None, ip: Any = None) -> None:
            self._tile_idx = self._tile_idx + cute.arch.grid_dim()[0]

    return Persistent


class DirectOutput(FlashAttentionForwardSm90):
    """Writes the output from registers: a persistent block loads Q where it would lie."""

    use_tma_O = property(lambda self: False, lambda self, value: None)  # noqa: N815
    head_size = 0  # Dh, without padding

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


def narrow_product(
    head_dim: int, tiled_mma: Any, acc: Any, a: Any, b: Any, zero_init: Any, B_idx: Any = None,
    wg_wait: int = -1,
) -> None:  # fmt: skip
    """sm90_utils.gemm_w_idx of the first `head_dim` columns of b: those behind are padding."""
    op = tiled_mma.op
    m, _, k = op.shape_mnk
    short = warpgroup.MmaF16BF16Op(
        op.a_dtype, op.acc_dtype, (m, head_dim, k), op.a_src, op.a_major_mode, op.b_major_mode
    )
    columns = cute.make_tensor(acc.iterator, cute.make_layout(((2, 2, head_dim // 8), 1, 1)))
    keys = b if B_idx is None else b[None, None, None, B_idx]
    sm90_utils.gemm(
        SimpleNamespace(op=short), columns, a, keys, zero_init=zero_init, wg_wait=wg_wait
    )


@contextmanager
def compiling(variant: Variant, head_dim: int, processors: int) -> Iterator[None]:
    """What is compiled inside is `variant`."""
    base = DirectOutput if variant.persistent else FlashAttentionForwardSm90
    settled: dict[str, Any] = {"head_size": head_dim}
    if variant.turns is not None:
        settled["use_scheduler_barrier"] = property(
            lambda self: variant.turns, lambda self, value: None
        )
    chosen = type("Chosen", (base,), settled)

    def kernel(*args: Any, **kwargs: Any) -> FlashAttentionForwardSm90:
        return chosen(*args, **{**kwargs, "num_stages": variant.stages})

    parts: dict[str, Any] = {}
    if variant.lazy:
        parts["Softmax"] = softmax_class(variant.poly)
    if variant.persistent:
        parts["SingleTileVarlenScheduler"] = scheduler_class(processors)
    if variant.narrow:
        products = {**vars(sm90_utils), "gemm_w_idx": partial(narrow_product, head_dim)}
        parts["sm90_utils"] = SimpleNamespace(**products)
    with (
        mock.patch.object(interface, "FlashAttentionForwardSm90", kernel),
        mock.patch.multiple(flash_fwd_sm90, **parts) if parts else mock.patch.dict({}),
    ):
        yield
