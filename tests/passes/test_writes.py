"""Writes into parts of tensors before attention: the values and the gradients of eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.agreement import agree


def heads(grad: bool = True) -> list[torch.Tensor]:
    return [torch.randn(2, 3, 8, 8, requires_grad=grad) for _ in range(3)]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def halves_turned(q: torch.Tensor) -> torch.Tensor:
    """Rotary positions written by halves, as some models do."""
    out = torch.empty_like(q)
    angle = torch.arange(q.shape[-2]).float()[:, None]
    out[..., ::2] = q[..., ::2] * angle.cos() - q[..., 1::2] * angle.sin()
    out[..., 1::2] = q[..., 1::2] * angle.cos() + q[..., ::2] * angle.sin()
    return out


def broadcast(q: torch.Tensor) -> torch.Tensor:
    out = q.clone()
    out[:, :, 2:5] = q[:, :, :1]
    return out


def other_dtype(q: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(q.shape)
    out[..., 3:] = q[..., 3:].double() * 2
    return out


def transposed_and_viewed(q: torch.Tensor) -> torch.Tensor:
    """The place is a transposed tensor, and what was written is read back by views."""
    out = torch.zeros_like(q).transpose(1, 2)
    out[...] = q.transpose(1, 2)
    part = out[:, 2:6]
    part[...] = out[:, :4] * 2
    read: torch.Tensor = out.flatten(2).unflatten(2, (q.shape[1], -1))
    return read.transpose(1, 2)


@pytest.mark.parametrize("write", [halves_turned, broadcast, other_dtype, transposed_and_viewed])
def test_written_parts(write: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return attention(write(q), write(k), v)

    assert agree(f, *heads()).site.verdict == "rewritten"


@pytest.mark.parametrize("gaps", [False, True])
def test_strides_read_of_what_was_written(gaps: bool) -> None:
    """``as_strided`` sees what lies where, also through views of what was written."""

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        place = torch.zeros(*q.shape[:2], 8, 16 if gaps else 8).transpose(-1, -2)[:, :, :: 2 if gaps else 1]
        place.copy_(q.transpose(-1, -2))
        return attention(place.as_strided(q.shape, q.stride()), k, v)

    assert agree(f, *heads(grad=False)).site.verdict == "rewritten"
