"""``flex_attention`` calls: read through their functions, as eager mode computes them; blocks that say more are kept.

There is no gradient of q, k and v on a CPU: flex_attention itself raises there, compiled or not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import attncomp
from attncomp.report import clear_reports
from tests.agreement import ALWAYS, agree

pytestmark = pytest.mark.filterwarnings("ignore")

N = 48


def qkv(length: int = N, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(2, 4, length, 16, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
    return i >= j


def window(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (i >= j) & (i - j < 8)


def blocks(mask_mod: Any, length: int = N) -> BlockMask:
    return create_block_mask(mask_mod, None, None, length, length, device="cpu", BLOCK_SIZE=16)


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return flex_attention(q, k, v)


def with_window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    mask = create_block_mask(window, None, None, q.shape[-2], k.shape[-2], device="cpu")
    return flex_attention(q, k, v, block_mask=mask, scale=0.2)


def softcap(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    mask = create_block_mask(causal, None, None, q.shape[-2], k.shape[-2], device="cpu")
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.tanh(s / 20) * 20, block_mask=mask)


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return flex_attention(q, k[:, :2], v[:, :2], enable_gqa=True)


def masked_by_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf")))


def empty_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    """Rows without a key are zero."""
    mask = create_block_mask(lambda b, h, i, j: i > j + 5, None, None, q.shape[-2], k.shape[-2], device="cpu")
    return flex_attention(q, k, v, block_mask=mask)


CASES: dict[str, tuple[Any, str]] = {
    "plain": (plain, "softmax rewritten mask=none"),
    "window": (with_window, "softmax rewritten mask=causal & window(8)"),
    "softcap": (softcap, "softmax rewritten mask=causal"),
    "grouped heads": (grouped, "softmax rewritten mask=none"),
    "mask in the score": (masked_by_scores, "softmax rewritten mask=causal"),
    "empty rows": (empty_rows, "softmax rewritten mask=causal(-6)"),
}
DYNAMIC = [False, pytest.param(True, marks=pytest.mark.slow)]


@pytest.mark.parametrize("dynamic", DYNAMIC)
@pytest.mark.parametrize("executor", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_a_call(name: str, executor: str, dynamic: bool) -> None:
    function, expected = CASES[name]
    assert agree(function, *qkv(), executor=executor, dynamic=dynamic).verdicts == [expected]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    assert agree(softcap, *qkv(dtype=dtype)).verdicts == ["softmax rewritten mask=causal"]


@pytest.mark.parametrize("dynamic", DYNAMIC)
def test_packed_documents(dynamic: bool) -> None:
    documents = torch.tensor([0] * 20 + [1] * 28)

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor) -> Any:
        def mask_mod(b: Any, h: Any, i: Any, j: Any) -> Any:
            return (documents[i] == documents[j]) & (i >= j)

        mask = create_block_mask(mask_mod, None, None, q.shape[-2], k.shape[-2], device="cpu")
        return flex_attention(q, k, v, block_mask=mask)

    assert agree(model, *qkv(), documents, dynamic=dynamic).verdicts == ["softmax rewritten mask=causal & document"]


def test_a_learned_bias_gets_its_gradient() -> None:
    bias = torch.randn(4, N, N, requires_grad=True)
    slopes = torch.randn(4, requires_grad=True)

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, slopes: torch.Tensor) -> Any:
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + bias[h, i, j] + slopes[h] * (j - i))

    made = agree(model, *qkv(), bias, slopes)
    assert made.verdicts == ["softmax rewritten mask=none"]
    assert len(made.eager.gradients) == 2
    assert all(float(g.norm()) > 0 for g in made.eager.gradients if g is not None)


def test_a_block_mask_from_outside() -> None:
    mask = blocks(window)

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return flex_attention(q, k, v, block_mask=mask)

    assert agree(model, *qkv()).verdicts == ["softmax rewritten mask=causal & window(8)"]


def tables(listed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `listed` blocks of each row of three."""
    order = torch.arange(3, dtype=torch.int32).expand(1, 1, 3, 3).contiguous()
    return torch.full((1, 1, 3), listed, dtype=torch.int32), order


@pytest.mark.parametrize(
    ("mask", "kept"),
    [
        (BlockMask.from_kv_blocks(*tables(3), BLOCK_SIZE=16, mask_mod=window, seq_lengths=(N, N)), False),
        (BlockMask.from_kv_blocks(*tables(2), BLOCK_SIZE=16, mask_mod=window, seq_lengths=(N, N)), True),
        (BlockMask.from_kv_blocks(*tables(3), *tables(1), BLOCK_SIZE=16, mask_mod=window, seq_lengths=(N, N)), True),
        (BlockMask.from_kv_blocks(*tables(1), BLOCK_SIZE=16, seq_lengths=(N, N)), True),
        (BlockMask.from_kv_blocks(*tables(3), BLOCK_SIZE=16, seq_lengths=(N, N)), True),
    ],
    ids=["every block", "too few blocks", "full blocks that are not", "blocks alone", "all blocks, alone"],
)
def test_blocks_chosen_by_hand(mask: BlockMask, kept: bool) -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return flex_attention(q, k, v, block_mask=mask)

    (verdict,) = agree(model, *qkv()).verdicts
    assert verdict == ("softmax kept block-mask" if kept else "softmax rewritten mask=causal & window(8)")


def test_blocks_of_another_function_in_the_graph() -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        other = create_block_mask(causal, None, None, N, N, device="cpu")
        mask = BlockMask.from_kv_blocks(
            other.kv_num_blocks,
            other.kv_indices,
            other.full_kv_num_blocks,
            other.full_kv_indices,
            mask_mod=window,
            seq_lengths=(N, N),
        )
        return flex_attention(q, k, v, block_mask=mask)

    assert agree(model, *qkv()).verdicts == ["softmax kept block-mask"]


def test_blocks_computed_from_data() -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        best = (q[:1, :1, ::16, 0] * 0).long()[..., None].int() + torch.arange(3, dtype=torch.int32)
        mask = BlockMask.from_kv_blocks(tables(2)[0], best, BLOCK_SIZE=16, mask_mod=causal, seq_lengths=(N, N))
        return flex_attention(q, k, v, block_mask=mask)

    assert agree(model, *qkv()).verdicts == ["softmax kept block-mask"]


def test_statistics_that_are_used_keep_the_call() -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return flex_attention(q, k, v, return_lse=True)

    assert agree(model, *qkv()).verdicts == ["softmax kept statistics-escape"]


def unread(kind: str, table: torch.Tensor) -> Any:
    def negative_index(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + table[i - j]

    def rounded(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return torch.round(s * 4) / 4

    return {"negative index": negative_index, "rounding": rounded}[kind]


@pytest.mark.parametrize("kind", ["negative index", "rounding"])
def test_functions_that_cant_be_read_keep_the_call(kind: str) -> None:
    score_mod = unread(kind, torch.randn(N))

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return flex_attention(q, k, v, score_mod=score_mod) + (q @ k.mT).softmax(-1) @ v

    assert agree(model, *qkv()).verdicts == ["softmax kept flex-function", "softmax rewritten mask=none"]


@pytest.mark.slow
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2"])
def test_models_of_transformers(family: str, padding: bool) -> None:
    """Their block masks are made between two graphs; positions are inputs of the second."""
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attn_implementation": "flex_attention",
    }
    window_of = {} if family == "Llama" else {"sliding_window": 6}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**sizes, **window_of)
    )
    given = {"input_ids": torch.randint(3, 50, (2, 16)), "use_cache": False}
    if padding:
        given["attention_mask"] = (torch.arange(16) >= torch.tensor([[5], [0]])).long()
    torch._dynamo.reset()
    clear_reports()
    fast: Any = torch.compile(model.eval(), backend="attncomp", options={"policy": ALWAYS, "executor": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(fast(**given).logits, model(**given).logits, rtol=1e-5, atol=1e-5)
    sites = [s for r in attncomp.reports() for s in r.sites]
    assert [s.verdict for s in sites] == ["rewritten"] * 2, [s.reason for s in sites]
    assert all("causal" in s.mask for s in sites)
    assert ("padding" in sites[0].mask) == padding
    assert any("window(6)" in s.mask for s in sites) == (family != "Llama")
