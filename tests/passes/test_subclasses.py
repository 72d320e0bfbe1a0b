"""Weights that are tensor subclasses, as quantised ones are: attention between such layers is rewritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.checkpoint import checkpoint

import attncomp
from attncomp.report import clear_reports
from tests.agreement import agree

aten = torch.ops.aten


class Quantised(Tensor):
    """int8 `codes` times a `scale` for each row (or column, transposed); any operator but views makes it plain."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Quantised:
        made: Quantised = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)
        return made

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # torch's logs print it without values
        return f"Quantised({list(self.shape)})"

    @classmethod
    def of(cls, weight: Tensor) -> Quantised:
        scale = weight.detach().abs().amax(-1, keepdim=True) / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> Quantised:
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has no defaults
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (aten.detach.default, aten.alias.default, aten.clone.default, aten.t.default):
            made = cls(func(args[0].codes), func(args[0].scale))
            return return_and_correct_aliasing(func, args, kwargs or {}, made)
        plain = [x.codes.to(x.scale.dtype) * x.scale if isinstance(x, cls) else x for x in args]
        return func(*plain, **(kwargs or {}))


class Block(nn.Module):
    def __init__(self, saved: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.saved = nn.Linear(32, 96, bias=False), nn.Linear(32, 32), saved
        for layer in (self.qkv, self.out):
            layer.weight = nn.Parameter(Quantised.of(layer.weight), requires_grad=False)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        heads = (q @ k.mT * 8**-0.5).softmax(-1) @ v
        made: Tensor = self.out(heads.transpose(1, 2).flatten(2))
        return made

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = checkpoint(self.attend, x, use_reentrant=False) if self.saved else self.attend(x)
        return x + made


class Blocks(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(Block(), Block(), Block())


class Transposed(Block):
    """The weights are transposed before the products, which are no linear layers then."""

    def attend(self, x: Tensor) -> Tensor:
        weight = self.qkv.weight.t()
        q, k, v = (x @ weight).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        heads = (q @ k.mT * 8**-0.5).softmax(-1) @ v
        made: Tensor = heads.transpose(1, 2).flatten(2) @ self.out.weight.t() + (x @ weight)[..., :32]
        return made


def tokens(grad: bool = True) -> Tensor:
    return torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1)).requires_grad_(grad)


@pytest.mark.parametrize("executor", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("model", [Block, Blocks, Transposed])
def test_attention_between_quantised_layers_is_rewritten(
    model: Callable[[], nn.Module], grad: bool, dynamic: bool, executor: str
) -> None:
    made = agree(model(), tokens(grad), dynamic=dynamic, executor=executor)
    assert {s.verdict for s in made.sites} == {"rewritten"}, made.reports
    assert len(made.sites) == (3 if model is Blocks else 1)


def test_inside_a_checkpoint() -> None:
    assert agree(Block(saved=True), tokens()).site.verdict == "rewritten"


def test_under_autocast() -> None:
    block = Block()

    class Under(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                made: Tensor = self.block(x)
            return made

    assert agree(Under(), tokens(False), forward=2e-2).site.verdict == "rewritten"


def test_what_is_mutated_beside_them_is() -> None:
    class Counting(Block):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) + self.calls

    assert agree(Counting(), tokens(False), calls=3).site.verdict == "rewritten"


class Returned(Block):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.qkv.weight.t()


class Written(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[0].addmm_(x[0], self.out.weight.t())
        return super().forward(y)


class Rescaled(Block):
    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.out.weight
        weight.scale.mul_(1.5)
        return super().forward(x)


class Product(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (self.out.weight @ self.out.weight.t())[0]


class Parts(Block):
    """A part of a subclass is an input of the graph by itself."""

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.out.weight
        made: Tensor = super().forward(x) + weight.scale[:, 0]
        return made


@pytest.mark.parametrize("model", [Returned, Written, Rescaled, Product, Parts])
def test_what_else_is_done_with_them_leaves_the_graph_whole(model: Callable[[], nn.Module]) -> None:
    x = tokens(False)
    plain = model()
    expected = [plain(x), plain(x)]
    torch._dynamo.reset()
    clear_reports()
    compiled = torch.compile(model(), backend="attncomp", options={"policy": "always", "executor": "eager"})
    found = [compiled(x), compiled(x)]
    for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True):
        assert type(a) is type(b)
        if type(a) is Tensor:
            torch.testing.assert_close(a, b)
    (report,) = attncomp.reports()
    assert (report.fallback or "").startswith("tensor-subclass") == (model is not Parts), report


def test_a_quantised_operand_of_the_attention_keeps_it() -> None:
    class Keys(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.keys = nn.Parameter(Quantised.of(torch.randn(24, 32)), requires_grad=False)

        def forward(self, x: Tensor, values: Tensor) -> Tensor:
            return (x @ self.keys.t()).softmax(-1) @ values

    made = agree(Keys(), tokens(False), torch.randn(24, 8))
    assert made.verdicts == []
