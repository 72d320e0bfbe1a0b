"""The fused SDPA kernels that torch ships, each called as its own ATen operator.

``F.scaled_dot_product_attention`` chooses a kernel when it runs; here the choice is made once, from the spec, so that
inductor sees the kernel's operator and graph caches key on it. What each kernel does with grouped heads, empty rows,
broadcast masks and causal rectangles was found by running it; the tests repeat it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from attncomp.codegen.sdpa import Call, SdpaKernel, Shares
from attncomp.expr import ONE
from attncomp.spec import AttentionSpec
from attncomp.variant import Rejection, Request

aten = torch.ops.aten

# Measured with torch 2.11 and cuDNN 9.19 on an H100 SXM, bfloat16, 8192 tokens, no mask, as shares of 989 TFLOP/s.
CUDNN_SHARES: Shares = ((64, 0.49, 0.46), (128, 0.67, 0.57), (256, 0.73, 0.37))
FLASH_SHARES: Shares = ((64, 0.31, 0.29), (128, 0.37, 0.30), (256, 0.34, 0.26))
EFFICIENT_SHARES: Shares = ((64, 0.135, 0.11), (128, 0.18, 0.14), (512, 0.14, 0.04))
# The same in float32 with 4096 tokens, as shares of 66.9 TFLOP/s.
EFFICIENT_FLOAT32_SHARES: Shares = ((64, 0.51, 0.52), (512, 0.70, 0.54))
# Decoding there, 32 heads on 8 of width 128, as shares of 3.35 TB/s: 8 and 64 sequences of 8192 keys took cuDNN 0.096
# and 0.703 ms, flash 0.098 and 0.787; one of 131072, 0.182 and 0.194 (benchmarks/dispatch.py).
CUDNN_BANDWIDTH, FLASH_BANDWIDTH, EFFICIENT_BANDWIDTH = 0.88, 0.83, 0.78
# Rows and lone programs (below) as times show them there, 16 heads of 128 against 16384 keys: 64, 512 and 2048 queries
# took cuDNN 0.191, 0.191 and 0.405 ms, flash 0.0625, 0.219 and 0.780, efficient 0.550, 0.548 and 1.64.

# Measured with torch 2.13 on 2 cores of a 2.8 GHz Xeon, float32, 4 heads of 4096 tokens (torch 2.11 on 4 newer cores:
# 0.63 and 0.49, 0.60 and 0.38).
CPU_FLASH_SHARES: Shares = ((64, 0.51, 0.54), (1024, 0.60, 0.62))
# The same machine: one query against 8192 keys, 16 heads of width 64, moves 16.7 GB/s where a copy moves 21.8 GB/s.
CPU_FLASH_BANDWIDTH = 0.77


class CpuFlash(SdpaKernel):
    """``_scaled_dot_product_flash_attention_for_cpu``."""

    def call(self, c: Call) -> torch.Tensor:
        out: torch.Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
            c.q, c.k, c.v, 0.0, c.causal, attn_mask=c.mask, scale=c.scale
        )[0]
        return out


class CudnnAttention(SdpaKernel):
    """``_scaled_dot_product_cudnn_attention``. Only newer versions take a bias, so none is offered here."""

    HOPPER_WIDTH: ClassVar[int] = 256

    def reject_widths(self, spec: AttentionSpec, request: Request) -> Rejection | None:
        if spec.size("i") == ONE and spec.size("j") == ONE:
            return Rejection("one-by-one", "cuDNN takes no single query on a single key")
        return super().reject_widths(spec, request)

    def widest(self, request: Request) -> int:
        return self.HOPPER_WIDTH if tuple(request.hardware.capability) == (9, 0) else self.max_width

    def call(self, c: Call) -> torch.Tensor:
        out: torch.Tensor = aten._scaled_dot_product_cudnn_attention(
            c.q, c.k, c.v, None, c.training, c.dropout, c.causal, False, scale=c.scale
        )[0]
        return out


class FlashAttention(SdpaKernel):
    """``_scaled_dot_product_flash_attention``. Its causal mask ends at the last key, as ``causal_lower_right`` of torch
    has it from this operator."""

    def call(self, c: Call) -> torch.Tensor:
        out: torch.Tensor = aten._scaled_dot_product_flash_attention(
            c.q, c.k, c.v, c.dropout, c.causal, False, scale=c.scale
        )[0]
        return out


class EfficientAttention(SdpaKernel):
    """``_scaled_dot_product_efficient_attention``. Its mask has all four sizes, and rows at multiples of 8 elements."""

    MASK_ALIGNMENT: ClassVar[int] = 8

    def call(self, c: Call) -> torch.Tensor:
        mask = c.mask
        if mask is not None:
            keys = c.k.shape[2]
            mask = mask.expand(-1, -1, -1, keys)
            mask = F.pad(mask, (0, -keys % self.MASK_ALIGNMENT)).narrow(3, 0, keys)
            mask = mask.expand(c.q.shape[0], c.q.shape[1], c.q.shape[2], keys)
        out: torch.Tensor = aten._scaled_dot_product_efficient_attention(
            c.q, c.k, c.v, mask, c.training, c.dropout, c.causal, scale=c.scale
        )[0]
        return out


VENDOR_CPU_FLASH = CpuFlash(
    name="vendor_cpu_flash",
    summary="torch's fused SDPA kernel for CPUs",
    devices=("cpu",),
    dtypes=("float32", "float64", "bfloat16", "float16"),
    max_width=1024,
    multiple=1,
    computed=1,
    grouped=True,
    masked=True,
    wide_mask=True,
    mask_gradient=False,
    dropout=False,
    rectangular=True,
    rows=1,
    lone=1.0,
    splits=True,
    decodes=True,
    capability=(0, 0),
    shares=CPU_FLASH_SHARES,
    wide_shares=CPU_FLASH_SHARES,
    bandwidth=CPU_FLASH_BANDWIDTH,
)

HALF = ("bfloat16", "float16")

VENDOR_CUDNN = CudnnAttention(
    name="vendor_cudnn",
    summary="cuDNN's fused attention",
    devices=("cuda",),
    dtypes=HALF,
    max_width=128,
    multiple=8,
    computed=64,
    grouped=True,
    masked=False,
    wide_mask=False,
    mask_gradient=False,
    dropout=True,
    rectangular=True,
    rows=128,
    lone=1.12,
    splits=False,
    decodes=True,
    capability=(8, 0),
    shares=CUDNN_SHARES,
    wide_shares=CUDNN_SHARES,
    bandwidth=CUDNN_BANDWIDTH,
)
VENDOR_FLASH = FlashAttention(
    name="vendor_flash",
    summary="the FlashAttention-2 kernel that torch ships",
    devices=("cuda",),
    dtypes=HALF,
    max_width=256,
    multiple=8,
    computed=32,
    grouped=True,
    masked=False,
    wide_mask=False,
    mask_gradient=False,
    dropout=True,
    rectangular=False,
    rows=128,
    lone=0.86,
    splits=True,
    decodes=True,
    capability=(8, 0),
    shares=FLASH_SHARES,
    wide_shares=FLASH_SHARES,
    bandwidth=FLASH_BANDWIDTH,
)
VENDOR_EFFICIENT = EfficientAttention(
    name="vendor_efficient",
    summary="the memory-efficient kernel that torch ships, with an additive mask",
    devices=("cuda",),
    dtypes=(*HALF, "float32"),
    max_width=512,
    multiple=8,
    computed=1,
    grouped=False,
    masked=True,
    wide_mask=False,
    mask_gradient=True,
    dropout=True,
    rectangular=True,
    rows=64,
    lone=0.73,
    splits=False,
    decodes=False,
    capability=(8, 0),
    shares=EFFICIENT_SHARES,
    wide_shares=EFFICIENT_FLOAT32_SHARES,
    bandwidth=EFFICIENT_BANDWIDTH,
)
