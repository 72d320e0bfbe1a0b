"""Models of many shapes with random weights, at the sizes people run: eager, inductor and attncomp.

The widths are those of the named models; the layers are fewer where the model has many equal ones. Each row is one
model, one attention implementation and one phase; sites, masks and chosen variants are printed below it.

Run with ``PYTHONPATH=. python benchmarks/zoo.py [--models REGEX] [--executors eager,inductor,attncomp] [--tiny]``.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attncomp
from benchmarks import measure as m

Phase = Literal["forward", "training"]


@dataclass(frozen=True)
class Entry:
    """A row: a transformers model type (or ``joint``, the diffusion transformer below) and what it is run on.

    tiny: what replaces the configuration's numbers, the batch and the length when the script is only being checked.
    """

    name: str
    model: str
    attention: str
    phase: Phase
    batch: int
    length: int
    config: dict[str, Any]
    tiny: dict[str, Any]
    encoder: bool = False


_LLAMA = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 5632,
    "num_hidden_layers": 8,
    "vocab_size": 8192,
    "use_cache": False,
}
_LLAMA_TINY = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 64,
}
_MISTRAL = {**_LLAMA, "sliding_window": 4096, "max_position_embeddings": 32768}
_GEMMA2 = {
    **_LLAMA,
    "hidden_size": 2304,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "intermediate_size": 9216,
    "sliding_window": 4096,
}
_T5 = {
    "d_model": 1024,
    "d_kv": 64,
    "num_heads": 16,
    "d_ff": 4096,
    "num_layers": 8,
    "vocab_size": 8192,
    "dropout_rate": 0.0,
}
_T5_TINY = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 2, "vocab_size": 64}
_BLOOM = {
    "hidden_size": 1536,
    "n_head": 16,
    "n_layer": 8,
    "vocab_size": 8192,
    "use_cache": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
_GPT2 = {
    "n_embd": 1024,
    "n_head": 16,
    "n_layer": 12,
    "n_positions": 2048,
    "vocab_size": 8192,
    "use_cache": False,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_GPT2_TINY = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 64}
_VIT = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 8}
_VIT_TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
_SWIN = {"embed_dim": 128, "depths": [2, 2, 6, 2], "num_heads": [4, 8, 16, 32], "drop_path_rate": 0.0}
_SWIN_TINY = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "image_size": 64, "window_size": 4}
_WHISPER = {
    "d_model": 1280,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "encoder_layers": 8,
    "num_mel_bins": 128,
    "decoder_layers": 1,
    "decoder_attention_heads": 20,
    "decoder_ffn_dim": 5120,
    "vocab_size": 8192,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
_WHISPER_TINY = {
    "d_model": 32,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "encoder_layers": 2,
    "num_mel_bins": 8,
    "max_source_positions": 32,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
}
_JOINT = {"hidden": 1536, "heads": 24, "layers": 8, "text": 333}
_JOINT_TINY = {"hidden": 32, "heads": 4, "layers": 2, "text": 5}


ENTRIES = (
    Entry("Mistral-shaped, window 4096", "mistral", "sdpa", "forward", 1, 16384, _MISTRAL, _LLAMA_TINY),
    Entry(
        "Gemma-2-shaped, softcap and window",
        "gemma2",
        "eager",
        "forward",
        1,
        8192,
        _GEMMA2,
        _LLAMA_TINY | {"head_dim": 8},
    ),
    Entry("T5-large encoder", "t5", "eager", "forward", 4, 4096, _T5, _T5_TINY, encoder=True),
    Entry("T5-large encoder", "t5", "eager", "training", 4, 4096, _T5, _T5_TINY, encoder=True),
    Entry(
        "BLOOM-shaped, ALiBi",
        "bloom",
        "eager",
        "forward",
        2,
        4096,
        _BLOOM,
        {"hidden_size": 32, "n_head": 4, "n_layer": 2},
    ),
    Entry("GPT-2 medium", "gpt2", "eager", "forward", 8, 2048, _GPT2, _GPT2_TINY),
    Entry("GPT-2 medium", "gpt2", "eager", "training", 8, 2048, _GPT2, _GPT2_TINY),
    Entry("GPT-2 medium", "gpt2", "sdpa", "forward", 8, 2048, _GPT2, _GPT2_TINY),
    Entry("GPT-2 medium", "gpt2", "sdpa", "training", 8, 2048, _GPT2, _GPT2_TINY),
    Entry("ViT-L/16", "vit", "eager", "forward", 64, 224, _VIT, _VIT_TINY),
    Entry("ViT-L/16", "vit", "sdpa", "forward", 64, 224, _VIT, _VIT_TINY),
    Entry("Swin-B", "swin", "eager", "forward", 64, 224, _SWIN, _SWIN_TINY),
    Entry("Whisper-large encoder", "whisper", "sdpa", "forward", 8, 3000, _WHISPER, _WHISPER_TINY, encoder=True),
    Entry("diffusion transformer, joint attention", "joint", "sdpa", "forward", 2, 4096, _JOINT, _JOINT_TINY),
)


class JointBlock(nn.Module):
    """A block of a diffusion transformer: text and image tokens keep their own weights and attend to each other.

    Queries and keys are normalised for each head; both streams are modulated by the timestep.
    """

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulate = nn.ModuleList(nn.Linear(hidden, 6 * hidden) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(hidden, 3 * hidden) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(hidden, 4 * hidden) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(4 * hidden, hidden) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(hidden // heads) for _ in range(2))

    def forward(self, image: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        streams = (image, text)
        changes = [layer(F.silu(time))[:, None].chunk(6, dim=-1) for layer in self.modulate]
        parts = []
        for x, layer, change in zip(streams, self.qkv, changes, strict=True):
            y = F.layer_norm(x, x.shape[-1:]) * (1 + change[0]) + change[1]
            parts.append(layer(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4))
        q, k, v = torch.cat(parts, dim=3).unbind(0)
        out = F.scaled_dot_product_attention(self.norms[0](q), self.norms[1](k), v)
        attended = out.transpose(1, 2).flatten(2).split([image.shape[1], text.shape[1]], dim=1)
        results = []
        for n, (x, change) in enumerate(zip(streams, changes, strict=True)):
            x = x + change[2] * self.out[n](attended[n])
            y = F.layer_norm(x, x.shape[-1:]) * (1 + change[3]) + change[4]
            results.append(x + change[5] * self.down[n](F.gelu(self.up[n](y))))
        return results[0], results[1]


class JointTransformer(nn.Module):
    """(B, T, hidden) image tokens with (B, text, hidden) text tokens and a timestep embedding (B, hidden)."""

    def __init__(self, hidden: int, heads: int, layers: int, text: int) -> None:
        super().__init__()
        self.text = text
        self.blocks = nn.ModuleList(JointBlock(hidden, heads) for _ in range(layers))

    def forward(self, image: Tensor, text: Tensor, time: Tensor) -> Tensor:
        for block in self.blocks:
            image, text = block(image, text, time)
        return image


class First(nn.Module):
    """A transformers model that returns its first output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor) -> Tensor:
        first: Tensor = self.model(*args, return_dict=False)[0]
        return first


def build(entry: Entry, device: str, dtype: torch.dtype, tiny: bool) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model with random weights, made on the device, and its inputs."""
    import transformers

    config = entry.config | (entry.tiny if tiny else {})
    batch, length = (2, min(entry.length, 64)) if tiny else (entry.batch, entry.length)
    torch.manual_seed(0)
    with torch.device(device):
        if entry.model == "joint":
            joint = JointTransformer(**config).to(dtype).eval()
            hidden = config["hidden"]
            shapes = ((batch, length, hidden), (batch, config["text"], hidden), (batch, hidden))
            return joint, tuple(torch.randn(s, dtype=dtype) for s in shapes)
        settings = transformers.AutoConfig.for_model(entry.model, **config)
        make: Any = transformers.AutoModel.from_config
        model: nn.Module = make(settings, attn_implementation=entry.attention, dtype=dtype).eval()
        if entry.encoder:
            model = getattr(model, "encoder", model)
        if entry.model in ("vit", "swin"):
            side = settings.image_size if tiny else length
            return First(model), (torch.randn(batch, 3, side, side, dtype=dtype),)
        if entry.model == "whisper":
            return First(model), (torch.randn(batch, settings.num_mel_bins, length, dtype=dtype),)
        return First(model), (torch.randint(0, settings.vocab_size, (batch, length)),)


def call_of(
    model: nn.Module, inputs: tuple[Tensor, ...], phase: Phase
) -> Callable[[Callable[..., Any]], Callable[[], Any]]:
    """From a compiled model to the call that is timed: the forward pass, or that and the gradients of all weights.

    It returns the first sequence's output, or some gradients of rank 2.
    """
    watched = [p for p in model.parameters() if p.dim() == 2][1:9]

    def forward(run: Callable[..., Any]) -> Callable[[], Any]:
        def once() -> Tensor:
            with torch.inference_mode():
                out: Tensor = run(*inputs)
                return out[:1]

        return once

    def training(run: Callable[..., Any]) -> Callable[[], Any]:
        # A fixed random direction: behind a last norm, the gradient of a mean square is nothing but rounding.
        direction: list[Tensor] = []

        def once() -> list[Tensor]:
            model.zero_grad(set_to_none=True)
            out = run(*inputs)
            if not direction:
                seeded = torch.Generator().manual_seed(2)
                direction.append(torch.randn(out.shape[1:], generator=seeded).to(out))
            (out * direction[0]).float().mean().backward()
            return [p.grad for p in watched if p.grad is not None]

        return once

    return forward if phase == "forward" else training


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help="only rows whose name, attention and phase hold this regex")
    parser.add_argument("--executors", default=",".join(m.EXECUTORS), help="which competitors, in order")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="small sizes and no inductor, to check the script")
    args = parser.parse_args(arguments)
    how = tuple(x for x in args.executors.split(",") if not (args.tiny and x == "inductor"))
    chosen = [e for e in ENTRIES if re.search(args.models, f"{e.name} {e.attention} {e.phase}")]
    if not chosen or not set(how) <= set(m.EXECUTORS):
        parser.error(f"no such rows or executors; executors are {', '.join(m.EXECUTORS)}")
    options = m.attncomp_options(always=args.tiny, debug=args.tiny)
    m.say(f"{m.conditions(args.device)}\n")
    rows = [measured(e, args.device, how, args.runs, options, args.tiny) for e in chosen]
    times = [title for x in how for title in (f"{x} ms", f"{x} GiB")]
    head = ["model", "attention", "phase", "batch x length", *times, *(f"{x} error" for x in m.EXECUTORS)]
    m.say(f"\n{m.table(head, rows)}")


def float32_output(model: nn.Module, inputs: tuple[Tensor, ...], device: str) -> Tensor | None:
    """The first sequence's output with the same weights in float32 (on the device, without TF32), if it fits."""
    try:
        with torch.inference_mode():
            first = tuple(x[:1].float() if x.is_floating_point() else x[:1] for x in inputs)
            out: Tensor = copy.deepcopy(model).float()(*first)
            return out
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        m.release(device)


def measured(
    entry: Entry, device: str, how: Sequence[str], runs: int, options: dict[str, Any], tiny: bool
) -> list[str]:
    """One row; the last columns are the relative differences from float32, in training from the first that ran."""
    dtype = torch.float32 if tiny else torch.bfloat16
    model, inputs = build(entry, device, dtype, tiny)
    call = call_of(model, inputs, entry.phase)
    cells: list[str] = []
    first: Any = float32_output(model, inputs, device) if entry.phase == "forward" else None
    errors = {}
    for name in how:
        before = len(attncomp.reports())
        result = m.measure(call(m.compiled(model, name, options)), device, runs=runs)
        if first is None:
            first = result.value
        errors[name] = m.difference(result.value, first)
        cells += [m.milliseconds(result), m.gibibytes(result)]
        m.say(
            f"{entry.name}, {entry.attention}, {entry.phase}, {name}: {cells[-2]} ms, {cells[-1]} GiB, "
            f"first call {result.first_s:.0f} s, difference {m.relative(errors[name])}"
        )
        for report in m.reports_since(before):
            m.say(f"  {m.report_summary([report])}")
    shape = " x ".join(str(n) for n in (entry.batch, entry.length))
    found = [m.relative(errors[x]) if x in errors else "-" for x in m.EXECUTORS]
    return [entry.name, entry.attention, entry.phase, shape, *cells, *found]


if __name__ == "__main__":
    main()
