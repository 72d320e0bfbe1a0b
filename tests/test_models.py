"""Small random-weight models of transformers, eager and sdpa.

Every site is rewritten, the mask proven, the answers equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import attncomp

transformers = pytest.importorskip("transformers")

ALWAYS = {"version": 1, "defaults": {"min_speedup": 0}}
LENGTH = 16


@dataclass(frozen=True)
class Case:
    """One model type: how to build it, how to call it, and the mask expected at each site, in order."""

    name: str
    build: Callable[[str], torch.nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    masks: tuple[str, ...]
    output: str = "logits"


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def _tokens(length: int) -> torch.Tensor:
    return torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(length))


def _decoder(length: int) -> dict[str, Any]:
    return {"input_ids": _tokens(length), "use_cache": False}


def _encoder(length: int) -> dict[str, Any]:
    return {"input_ids": _tokens(length)}


def _both(length: int) -> dict[str, Any]:
    return {"input_ids": _tokens(length), "decoder_input_ids": _tokens(length - 5), "use_cache": False}


def _image(length: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(length))}


def _speech(length: int) -> dict[str, Any]:
    features = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(length))
    return {"input_features": features, "decoder_input_ids": _tokens(length), "use_cache": False}


def _make(model: str, config: str, **sizes: Any) -> Callable[[str], torch.nn.Module]:
    def build(attention: str) -> torch.nn.Module:
        settings = getattr(transformers, config)(**sizes, attn_implementation=attention)
        torch.manual_seed(0)
        made: torch.nn.Module = getattr(transformers, model)(settings)
        return made

    return build


GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
CASES = (
    Case(
        "gpt2",
        _make(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
        ),
        _decoder,
        ("causal",) * 2,
    ),
    Case("llama", _make("LlamaForCausalLM", "LlamaConfig", **GROUPED), _decoder, ("causal",) * 2),
    Case("qwen3", _make("Qwen3ForCausalLM", "Qwen3Config", **GROUPED), _decoder, ("causal",) * 2),
    Case(
        "mistral",
        _make("MistralForCausalLM", "MistralConfig", **GROUPED, sliding_window=5),
        _decoder,
        ("causal & window(5)",) * 2,
    ),
    Case(
        "gemma2",
        _make("Gemma2ForCausalLM", "Gemma2Config", **GROUPED, sliding_window=5),
        _decoder,
        ("causal & window(5)", "causal"),
    ),
    Case(
        "bert",
        _make("BertForMaskedLM", "BertConfig", **SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        _encoder,
        ("none",) * 2,
    ),
    Case(
        "t5",
        _make(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
        ),
        _both,
        ("none", "none", "causal", "none", "causal", "none"),
    ),
    Case(
        "bart",
        _make(
            "BartForConditionalGeneration",
            "BartConfig",
            vocab_size=64,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
            dropout=0.0,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
        ),
        _both,
        ("none", "none", "causal", "none", "causal", "none"),
    ),
    Case(
        "vit",
        _make(
            "ViTForImageClassification",
            "ViTConfig",
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        _image,
        ("none",) * 2,
    ),
    Case(
        "whisper",
        _make(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=64,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=64,
            dropout=0.0,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        _speech,
        ("none", "none", "causal", "none", "causal", "none"),
    ),
)


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def _compiled(model: torch.nn.Module, **kwargs: Any) -> Any:
    torch._dynamo.reset()
    options: dict[str, Any] = {"policy": ALWAYS, "executor": "eager"}
    return torch.compile(model, backend="attncomp", options=options, **kwargs)


def _last_sites() -> tuple[Any, ...]:
    return tuple(s for s in attncomp.reports()[-1].sites)


def _pairs(cases: Sequence[Case], slow: Sequence[str]) -> list[Any]:
    """Every case with both attention implementations, where the library has both: Gemma 2's softcap excludes sdpa.

    slow: the names of cases whose calls of sdpa are those of another one.
    """
    return [
        pytest.param(
            c,
            attention,
            id=f"{c.name}-{attention}",
            marks=[pytest.mark.slow] if attention == "sdpa" and c.name in slow else [],
        )
        for c in cases
        for attention in ("eager", "sdpa")
        if (c.name, attention) != ("gemma2", "sdpa")
    ]


@pytest.mark.parametrize(("case", "attention"), _pairs(CASES, slow=("qwen3", "bart", "whisper")))
def test_inference_and_training(case: Case, attention: str) -> None:
    model = case.build(attention).train()
    inputs = case.inputs(LENGTH)
    expected = model(**inputs)[case.output] if case.output != "logits" else model(**inputs).logits
    expected.square().mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    result = _compiled(model)(**inputs).logits
    result.square().mean().backward()
    assert [s.verdict for s in _last_sites()] == ["rewritten"] * len(case.masks), _last_sites()
    assert tuple(s.mask for s in _last_sites()) == case.masks
    assert _relative(result, expected) < 1e-5
    total = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
    for name, parameter in model.named_parameters():
        if name in gradients:  # relative to the whole gradient where a parameter's own is rounding noise
            assert parameter.grad is not None
            error = float((parameter.grad.double() - gradients[name].double()).norm())
            assert error < 1e-4 * max(float(gradients[name].double().norm()), 1e-3 * total), name
    model.eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        assert _relative(_compiled(model)(**inputs).logits, expected) < 1e-5
    assert [s.verdict for s in _last_sites()] == ["rewritten"] * len(case.masks)


@pytest.mark.parametrize(
    ("case", "attention"),
    _pairs([c for c in CASES if c.name in ("llama", "gemma2", "bert", "t5")], slow=("llama", "t5")),
)
def test_one_dynamic_compile_serves_three_lengths(case: Case, attention: str) -> None:
    model = case.build(attention).eval()
    compiled = _compiled(model, dynamic=True)
    before = len(attncomp.reports())
    with torch.no_grad():
        for length in (16, 23, 40):
            inputs = case.inputs(length)
            assert _relative(compiled(**inputs).logits, model(**inputs).logits) < 1e-5
    assert len(attncomp.reports()) == before + 1, "a length was compiled again"
    assert [s.verdict for s in _last_sites()] == ["rewritten"] * len(case.masks)
    assert tuple(s.mask for s in _last_sites()) == case.masks
