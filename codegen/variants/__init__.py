"""Every way to compute an attention, in the order in which equal predictions are preferred."""

from __future__ import annotations

from attncomp.variant import Variant

VARIANTS: tuple[Variant, ...] = ()
