"""Every way to compute an attention, in the order in which equal predictions are preferred."""

from __future__ import annotations

from attncomp.codegen.variants.blocked import BLOCKED
from attncomp.codegen.variants.blocked_keys import BLOCKED_KEYS
from attncomp.codegen.variants.checked import VENDOR_CPU_FLASH_CHECKED
from attncomp.codegen.variants.chunked_linear import CHUNKED_LINEAR
from attncomp.codegen.variants.chunked_recurrence import CHUNKED_RECURRENCE
from attncomp.codegen.variants.keys_first import KEYS_FIRST
from attncomp.codegen.variants.split_kv import SPLIT_KV
from attncomp.codegen.variants.tiled import TILED
from attncomp.codegen.variants.tiled_checked import TILED_CHECKED
from attncomp.codegen.variants.tiled_pruned import TILED_PRUNED
from attncomp.codegen.variants.transposed_recurrence import TRANSPOSED_RECURRENCE
from attncomp.codegen.variants.vendor import VENDOR_CPU_FLASH, VENDOR_CUDNN, VENDOR_EFFICIENT, VENDOR_FLASH
from attncomp.variant import Variant

VARIANTS: tuple[Variant, ...] = (
    VENDOR_CPU_FLASH,
    VENDOR_CPU_FLASH_CHECKED,
    VENDOR_CUDNN,
    VENDOR_FLASH,
    VENDOR_EFFICIENT,
    CHUNKED_LINEAR,
    CHUNKED_RECURRENCE,
    TRANSPOSED_RECURRENCE,
    KEYS_FIRST,
    TILED,
    TILED_CHECKED,
    TILED_PRUNED,
    SPLIT_KV,
    BLOCKED,
    BLOCKED_KEYS,
)
