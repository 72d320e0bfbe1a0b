"""Masks that transformers makes for its models, as they are proven; and that the answers stay those of eager mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import attncomp

transformers = pytest.importorskip("transformers")

ALWAYS = {"version": 1, "defaults": {"min_speedup": 0}}
N = 16
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GROUPED = {**SIZES, "head_dim": 8}
LAYERS = ["sliding_attention", "full_attention"]


def tokens(length: int = N) -> torch.Tensor:
    return torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(length))


def ones(left: int = 0, right: int = 0) -> torch.Tensor:
    mask = torch.ones(2, N, dtype=torch.int64)
    mask[0, :left] = 0
    mask[1, N - right :] = 0
    return mask


PACKED = torch.tensor([[*range(6), *range(10)], [*range(9), *range(7)]])
IMAGE = torch.zeros(2, N, dtype=torch.int64)
IMAGE[:, 3:8] = 1
SUFFIX = torch.zeros(2, N, dtype=torch.int64)
SUFFIX[:, 9:] = 1


def make(model: str, config: str, **sizes: Any) -> Callable[[str], torch.nn.Module]:
    def build(attention: str) -> torch.nn.Module:
        torch.manual_seed(0)
        settings = getattr(transformers, config)(**sizes, attn_implementation=attention)
        made: torch.nn.Module = getattr(transformers, model)(settings)
        return made.eval()

    return build


def with_images(model: str, config: str, text: str, attention: str, **more: Any) -> torch.nn.Module:
    """A model of text and images, which is given text only."""
    sight = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        vision_use_head=False,
    )
    extra = {"sliding_window": 5, "layer_types": LAYERS} if text == "Gemma3TextConfig" else {}
    words = getattr(transformers, text)(**GROUPED, **extra)
    torch.manual_seed(0)
    settings = getattr(transformers, config)(
        text_config=words.to_dict(), vision_config=sight.to_dict(), attn_implementation=attention, **more
    )
    made: torch.nn.Module = getattr(transformers, model)(settings)
    return made.eval()


def gemma3_images(attention: str) -> torch.nn.Module:
    more = {"mm_tokens_per_image": 4, "image_token_index": 63, "image_token_id": 63}
    return with_images("Gemma3ForConditionalGeneration", "Gemma3Config", "Gemma3TextConfig", attention, **more)


def paligemma(attention: str) -> torch.nn.Module:
    more = {"image_token_index": 63, "projection_dim": 32, "hidden_size": 32}
    return with_images("PaliGemmaForConditionalGeneration", "PaliGemmaConfig", "GemmaConfig", attention, **more)


class Decoding(torch.nn.Module):
    """A model with a cache that holds 16 tokens."""

    def __init__(self, model: torch.nn.Module, cache: Any) -> None:
        super().__init__()
        self.model, self.cache = model, cache
        with torch.no_grad():
            model(tokens(), past_key_values=cache, use_cache=True)

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs, past_key_values=self.cache, use_cache=True)


def static_cache(attention: str) -> torch.nn.Module:
    model = llama(attention)
    return Decoding(model, transformers.StaticCache(config=model.config, max_cache_len=32))


def dynamic_cache(attention: str) -> torch.nn.Module:
    model = llama(attention)
    return Decoding(model, transformers.DynamicCache(config=model.config))


llama = make("LlamaForCausalLM", "LlamaConfig", **GROUPED)
mistral = make("MistralForCausalLM", "MistralConfig", **GROUPED, sliding_window=5)
llama4 = make(
    "Llama4ForCausalLM",
    "Llama4TextConfig",
    **GROUPED,
    attention_chunk_size=5,
    num_local_experts=2,
    intermediate_size_mlp=48,
    layer_types=["chunked_attention", "full_attention"],
    no_rope_layers=[1, 0],
    moe_layers=[],
)
gpt_oss = make(
    "GptOssForCausalLM",
    "GptOssConfig",
    **GROUPED,
    sliding_window=5,
    num_local_experts=2,
    num_experts_per_tok=1,
    layer_types=LAYERS,
)
cohere2 = make("Cohere2ForCausalLM", "Cohere2Config", **SIZES, sliding_window=5, layer_types=LAYERS, eos_token_id=2)
gemma3 = make("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED, sliding_window=5, layer_types=LAYERS)
bert_sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
modernbert = make(
    "ModernBertForMaskedLM",
    "ModernBertConfig",
    **bert_sizes,
    **special,
    local_attention=6,
    global_attn_every_n_layers=2,
)
codegen = make(
    "CodeGenForCausalLM",
    "CodeGenConfig",
    vocab_size=64,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=64,
    rotary_dim=4,
    bos_token_id=1,
    eos_token_id=2,
)


@dataclass(frozen=True)
class Case:
    """A model, what it is given beside 16 tokens, and the masks of its two layers."""

    name: str
    build: Callable[[str], torch.nn.Module]
    inputs: dict[str, Any]
    masks: tuple[str, str]
    attention: str = "sdpa"


CASES = (
    Case("positions given", llama, {"position_ids": torch.arange(N)[None]}, ("causal & document",) * 2),
    Case("packed", llama, {"position_ids": PACKED}, ("causal & document",) * 2),
    Case("packed, eager", llama, {"position_ids": PACKED}, ("causal & document",) * 2, "eager"),
    Case("packed in windows", mistral, {"position_ids": PACKED}, ("causal & window(5) & document",) * 2),
    Case("padded left", llama, {"attention_mask": ones(left=5)}, ("causal & padding",) * 2),
    Case("padded right", llama, {"attention_mask": ones(right=4)}, ("causal & padding",) * 2),
    Case("padded windows", mistral, {"attention_mask": ones(left=5)}, ("causal & window(5) & padding",) * 2),
    Case("llama4", llama4, {}, ("causal & chunk(5)", "causal")),
    Case(
        "llama4, padded", llama4, {"attention_mask": ones(left=3)}, ("causal & chunk(5) & padding", "causal & padding")
    ),
    Case("gemma3", gemma3, {}, ("causal & window(5)", "causal")),
    Case("gemma3, images", gemma3_images, {"token_type_ids": IMAGE}, ("window(5) & (causal | span)", "causal | span")),
    Case("paligemma", paligemma, {"token_type_ids": SUFFIX}, ("causal | span",) * 2),
    Case("gpt_oss", gpt_oss, {}, ("causal & window(5)", "causal"), "eager"),
    Case("cohere2", cohere2, {}, ("causal & window(5)", "causal")),
    Case("modernbert", modernbert, {"attention_mask": ones(right=4)}, ("padding", "causal(3) & window(4) & padding")),
    Case("codegen", codegen, {}, ("causal", "causal"), "eager"),
    Case("one token, static cache", static_cache, {"input_ids": tokens(1)}, ("causal(data)",) * 2),
    Case("three tokens, dynamic cache", dynamic_cache, {"input_ids": tokens(3)}, ("causal",) * 2),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_masks_of_a_model(case: Case) -> None:
    inputs = {"input_ids": tokens(), **case.inputs}
    caches = case.build in (static_cache, dynamic_cache)
    if not caches:
        inputs["use_cache"] = False
    if case.build is modernbert:
        del inputs["use_cache"]
    with torch.no_grad():
        expected = case.build(case.attention)(**inputs).logits
        torch._dynamo.reset()
        options: dict[str, Any] = {"policy": ALWAYS, "executor": "eager"}
        before = len(attncomp.reports())
        found = torch.compile(case.build(case.attention), backend="attncomp", options=options)(**inputs).logits
    sites = [s for r in attncomp.reports()[before:] for s in r.sites if s.mask != "unknown"]
    assert tuple(s.mask for s in sites) == case.masks, [str(r) for r in attncomp.reports()[before:]]
    assert [s.verdict for s in sites] == ["rewritten"] * 2
    assert float((found - expected).norm() / expected.norm()) < 1e-5
