"""``model.generate`` compiled: the tokens of eager mode, decoding steps rewritten, one compilation for all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import attncomp

transformers = pytest.importorskip("transformers")

OPTIONS: dict[str, Any] = {"policy": {"version": 1, "defaults": {"min_speedup": 0}}, "executor": "eager"}
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
NEW = 12
SLOW = pytest.mark.slow


def build(name: str) -> Any:
    """A small model with random weights."""
    made = {
        "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
        "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**SIZES, "sliding_window": 6}),
        "gpt2": (
            "GPT2LMHeadModel",
            "GPT2Config",
            {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        ),
    }
    model, config, sizes = made[name]
    torch.manual_seed(0)
    settings = getattr(transformers, config)(**sizes, **SPECIAL, attn_implementation="sdpa")
    built = getattr(transformers, model)(settings).eval()
    for parameter in built.parameters():  # logits that differ by more than rounding
        parameter.data.mul_(3.0)
    return built


def tokens(batch: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(length))


def generate(model: Any, prompt: torch.Tensor, new: int = NEW, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, **kwargs
        )
    return found


@contextlib.contextmanager
def watched() -> Iterator[list[Any]]:
    """The reports of what is compiled inside the block."""
    before = attncomp.reports()
    found: list[Any] = []
    yield found
    found.extend(r for r in attncomp.reports() if not any(r is old for old in before))


def decoding(reports: list[Any]) -> list[Any]:
    """The sites that answer one query."""
    return [s for r in reports for s in r.sites if " Q1 " in s.shape]


@pytest.mark.parametrize("name", [pytest.param("llama", marks=SLOW), "gemma3", pytest.param("gpt2", marks=SLOW)])
def test_growing_cache(name: str) -> None:
    """The forward pass compiled, the cache a list of tensors that grow: the prompt, and steps of any length."""
    model = build(name)
    expected = generate(model, tokens())
    model.forward = torch.compile(model.forward, backend="attncomp", options=OPTIONS)
    with watched() as reports:
        assert generate(model, tokens()).tolist() == expected.tolist()
    assert decoding(reports), "no step was recognised"
    assert [s.verdict for r in reports for s in r.sites] == ["rewritten"] * sum(len(r.sites) for r in reports)
    with watched() as later:
        generate(model, tokens(), new=2 * NEW)
    assert not later, "longer sequences were compiled again"


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=SLOW), pytest.param("gpt2", marks=SLOW)])
def test_static_cache(name: str) -> None:
    """The cache has its full length from the start, and each step writes one place of it."""
    model = build(name)
    expected = generate(model, tokens())
    model.forward = torch.compile(model.forward, backend="attncomp", options=OPTIONS)
    with watched() as reports:
        found = generate(model, tokens(), cache_implementation="static")
    assert found.tolist() == expected.tolist()
    assert [len(decoding([r])) for r in reports] == [0, 2], "the prompt, and one compilation for all steps"
    assert {s.verdict for r in reports for s in r.sites} == {"rewritten"}


def test_static_cache_compiles_by_itself() -> None:
    """`cache_implementation="static"` compiles the decoding step with what `CompileConfig` names."""
    model = build("llama")
    expected = generate(model, tokens())
    config = transformers.CompileConfig(backend="attncomp", options=OPTIONS, mode=None)
    config._compile_all_devices = True  # transformers does so on GPUs alone, unless told otherwise
    with watched() as reports:
        found = generate(model, tokens(), cache_implementation="static", compile_config=config)
    assert found.tolist() == expected.tolist()
    (report,) = reports
    assert [s.verdict for s in decoding([report])] == ["rewritten"] * 2


# --- encoders with decoders: the decoder is what `generate` calls at each step

TWO: dict[str, Any] = {
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "decoder_layers": 2,
    "decoder_start_token_id": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "encoder_layers": 2,
    "d_model": 32,
    "vocab_size": 64,
}
LENGTH = 9
"""Of what is encoded."""


def build_pair(name: str) -> Any:
    """T5 writes its attention out, with biases of relative positions; Whisper calls SDPA."""
    made = {
        "t5": ("T5", {"d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2, "decoder_start_token_id": 0, **SPECIAL}),
        "whisper": (
            "Whisper",
            {"num_mel_bins": 8, "max_source_positions": LENGTH, "max_target_positions": 64, **TWO, **SPECIAL},
        ),
    }
    family, sizes = made[name]
    torch.manual_seed(0)
    suppressed = {"suppress_tokens": None, "begin_suppress_tokens": None} if name == "whisper" else {}
    config = getattr(transformers, f"{family}Config")(**{"vocab_size": 64, "d_model": 32, **sizes, **suppressed})
    model = getattr(transformers, f"{family}ForConditionalGeneration")
    built = model._from_config(config, attn_implementation="eager" if name == "t5" else "sdpa").eval()
    for parameter in built.parameters():
        parameter.data.mul_(3.0)
    return built


def translate(model: Any, new: int = NEW, **kwargs: Any) -> list[list[int]]:
    if model.config.model_type == "t5":
        given = {"input_ids": tokens(length=LENGTH), "attention_mask": torch.ones(2, LENGTH, dtype=torch.int64)}
    else:
        given = {"input_features": torch.randn(2, 8, 2 * LENGTH, generator=torch.Generator().manual_seed(1))}
    with torch.no_grad():
        found: list[list[int]] = model.generate(**given, max_new_tokens=new, do_sample=False, **kwargs).tolist()
    return found


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("t5", "static"),
        ("whisper", "dynamic"),
        pytest.param("t5", "dynamic", marks=SLOW),
        pytest.param("whisper", "static", marks=SLOW),
    ],
)
def test_encoder_and_decoder(name: str, cache: str) -> None:
    """Steps and cross attention are rewritten, and compiled as often as by a backend that does nothing."""
    settings: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}
    expected = translate(build_pair(name), **settings)
    compilations = []
    plain = build_pair(name)

    def count(graph: Any, inputs: Any) -> Any:
        compilations.append(graph)
        return graph

    plain.forward = torch.compile(plain.forward, backend=count)
    translate(plain, **settings)
    torch._dynamo.reset()
    model = build_pair(name)
    model.forward = torch.compile(model.forward, backend="attncomp", options=OPTIONS)
    with watched() as reports:
        assert translate(model, **settings) == expected
    assert len(reports) == len(compilations)
    assert not [r.fallback for r in reports if r.fallback]
    for report in reports[1:]:  # with a cache that grows, the first step of T5 has a single key
        assert [s.verdict for s in report.sites] == ["rewritten"] * 4, "self and cross attention of two layers"
        assert sum(f" K{LENGTH} " in s.shape for s in report.sites) >= 2
    assert len(reports) < NEW
    if cache == "dynamic":
        with watched() as later:
            translate(model, new=2 * NEW)
        assert not later, "longer sequences were compiled again"
