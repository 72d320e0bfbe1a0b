"""Arithmetic in two finite fields, for testing identities of programs (Schwartz, 1980; Zippel, 1979; DeMillo & Lipton,
1978).

A polynomial identity in n variables that does not hold is found out by one evaluation at random points of a field of p
elements, but for a chance of at most (degree / p). `VALUES` has p = 134217323 elements. Exponents live in `EXPONENTS`,
of q = (p - 1) / 2 elements, prime too: exp is the homomorphism x -> 4^x from its addition to the multiplication of the
squares of `VALUES`, of which there are q.

Residues are int64 tensors. p is below 2^27, so that a product of two fits into int64, and a matrix product is exact in
float64 with one operand split in halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

_HALF = 14
_INNER = 4096
"""The longest sum of products of a residue and a half that is exact in float64: 4096 * 2^27 * 2^14 = 2^53."""

_FEW = 64
"""Elements whose powers are found one by one; on a tensor, they take fifty operations."""


class ZeroDivisorError(Exception):
    """A divisor is zero at this point of the field (internal: another point is drawn)."""


@dataclass(frozen=True, slots=True)
class Field:
    """The integers modulo a prime below 2^27."""

    order: int

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.remainder_(self.order)

    def number(self, x: int) -> int:
        return x % self.order

    def multiply(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.reduce(a * b)

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The matrix product of (..., m, n) and (..., n, k)."""
        size = a.shape[-1]
        if size > _INNER:
            cut = _INNER
            first = self.product(a[..., :cut], b[..., :cut, :])
            return self.reduce(first + self.product(a[..., cut:], b[..., cut:, :]))
        right = b.double()
        high = self.reduce((a >> _HALF).double().matmul(right).long())
        low = (a & ((1 << _HALF) - 1)).double().matmul(right).long()
        return self.reduce(high.bitwise_left_shift_(_HALF).add_(low))

    def power(self, x: torch.Tensor, n: int) -> torch.Tensor:
        if x.numel() <= _FEW:
            return x.new_tensor([pow(a, n, self.order) for a in x.flatten().tolist()]).view(x.shape)
        result = torch.ones_like(x)
        while n:
            if n & 1:
                result = self.multiply(result, x)
            n >>= 1
            if n:
                x = self.multiply(x, x)
        return result

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """1 / x.

        Raises:
            ZeroDivisorError: somewhere x is zero.
        """
        if bool((x == 0).any()):
            raise ZeroDivisorError
        return self.inverse_or_zero(x)

    def inverse_or_zero(self, x: torch.Tensor) -> torch.Tensor:
        """1 / x, and 0 for 0: for those who compare the product again."""
        return self.power(x, self.order - 2)

    def cumulated(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Sums along a dimension: exact, since sums of less than 2^36 residues stay in int64."""
        return self.reduce(x.cumsum(dim))

    def multiplied(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Products along a dimension, from its start to each place."""
        found = x.clone()
        for n in range(1, x.shape[dim]):
            found.select(dim, n).copy_(self.multiply(found.select(dim, n - 1), x.select(dim, n)))
        return found


VALUES = Field(134217323)
EXPONENTS = Field((VALUES.order - 1) // 2)


@lru_cache(maxsize=1)
def _powers() -> tuple[torch.Tensor, torch.Tensor]:
    low, step = [1], pow(4, 1 << _HALF, VALUES.order)
    for _ in range((1 << _HALF) - 1):
        low.append(low[-1] * 4 % VALUES.order)
    high = [1]
    for _ in range(EXPONENTS.order >> _HALF):
        high.append(high[-1] * step % VALUES.order)
    return torch.tensor(low), torch.tensor(high)


def exponential(exponents: torch.Tensor) -> torch.Tensor:
    """4^x in `VALUES`, for x in `EXPONENTS`."""
    low, high = _powers()
    return VALUES.multiply(low[exponents & ((1 << _HALF) - 1)], high[exponents >> _HALF])


def scattered(x: torch.Tensor, seed: int) -> torch.Tensor:
    """A 62-bit hash of each element: a random function, drawn by `seed`, of int64 values (Steele et al., 2014)."""
    x = x ^ seed
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (x ^ (x >> 31)) & ((1 << 62) - 1)
