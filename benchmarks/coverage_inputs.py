"""Inputs for any model, from the signature of its forward and its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.coverage_configs import sub_configs

BATCH, LENGTH = 2, 24
OTHER_BATCH, OTHER_LENGTH = 2, 37


def find(config: Any, *names: str) -> Any:
    """The first of these attributes that a configuration or one inside it has."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    for sub in sub_configs(config):
        value = find(sub, *names)
        if value is not None:
            return value
    return None


def parameters(model: torch.nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(model.forward).parameters)


def candidates(model: torch.nn.Module, batch: int, length: int) -> Iterator[dict[str, Any]]:
    """Keyword arguments that the model may run with, the fullest first."""
    config: Any = model.config
    names = parameters(model)
    required = [
        n for n, p in names.items() if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    extra: dict[str, Any] = {}
    if "use_cache" in names:
        extra["use_cache"] = False
    text = _text(config, names, batch, min(length, _positions(config)))
    mains = [m for m in MAINS if m in names]
    first = getattr(model, "main_input_name", None)
    if first in mains:
        mains = [first, *(m for m in mains if m != first)]
    seen: set[str] = set()

    def with_required(chosen: dict[str, Any]) -> dict[str, Any] | None:
        full = {**extra, **chosen}
        for name in required:
            if name not in full:
                made = _required(name, config, batch, length)
                if made is None:
                    return None
                full[name] = made
        key = repr(sorted((k, tuple(v.shape) if isinstance(v, torch.Tensor) else v) for k, v in full.items()))
        if key in seen:
            return None
        seen.add(key)
        return full

    groups: list[list[dict[str, Any]]] = []
    flat = [n for n in ("grid_thw", "spatial_shapes", "pixel_position_ids", "target_sizes") if n in names]
    for main in mains:
        made = [{main: x} for x in _variants(main, config, batch, length)]
        if flat and main in ("pixel_values", "hidden_states"):
            made = [
                {main: x, **_grids(names, batch, x)} for x in _variants(main, config, batch, length, flat=True)
            ] + made
        groups.append(made)
    both = [{**a, **text} for g in groups for a in g] if text else []
    alone = [a for g in groups for a in g]
    pairs = [{**a, **b} for n, g in enumerate(groups) for h in groups[n + 1 :] for a in g[:3] for b in h[:3]]
    needs_text = text if first in text or first is None else {}
    for chosen in (*([] if not needs_text else both), *([text] if text else []), *alone, *both, *pairs, {}):
        full = with_required(chosen)
        if full is not None:
            yield full


def _grids(names: dict[str, Any], batch: int, patches: torch.Tensor) -> dict[str, torch.Tensor]:
    """What says how rows of patches form images of 8 x 8 patches."""
    sides = torch.arange(64)
    places = torch.stack((sides % 8, sides // 8), -1)
    each = places.repeat(batch, 1, 1) if patches.dim() == 3 else places.repeat(batch, 1)
    known = {
        "grid_thw": torch.tensor([[1, 8, 8]] * batch),
        "spatial_shapes": torch.tensor([[8, 8]] * batch),
        "pixel_attention_mask": torch.ones(batch, 64, dtype=torch.long),
        "pixel_position_ids": each,
        "target_sizes": torch.tensor([[8, 8]] * batch),
    }
    return {k: v for k, v in known.items() if k in names}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(config: Any, batch: int, length: int) -> torch.Tensor:
    vocabulary = find(config, "vocab_size", "text_vocab_size", "n_words") or 32
    top = max(4, min(int(vocabulary) - 1, 100)) if isinstance(vocabulary, int) else 30
    return torch.randint(3, top, (batch, length), generator=_generator(length))


def _positions(config: Any) -> int:
    value = find(config, "max_position_embeddings", "n_positions")
    return value if isinstance(value, int) and value > 3 else 1024


def _text(config: Any, names: dict[str, Any], batch: int, length: int) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    if "input_ids" in names:
        chosen["input_ids"] = tokens(config, batch, length)
    if "decoder_input_ids" in names and find(config, "is_encoder_decoder") is not False:
        chosen["decoder_input_ids"] = tokens(config, batch, max(length - 5, 1))
    if "bbox" in names:
        corner = torch.randint(0, 40, (batch, length, 2), generator=_generator(1))
        chosen["bbox"] = torch.cat((corner, corner + 20), -1)
    return chosen


MAINS = (
    "pixel_values",
    "pixel_values_videos",
    "input_features",
    "input_values",
    "hidden_states",
    "inputs_embeds",
    "input_points",
    "past_values",
    "inputs",
    "audio_values",
    "waveform",
    "spectrogram",
    "sequences",
    "codes",
    "audio_codes",
    "image_embeddings",
    "query_embeds",
)


def _variants(main: str, config: Any, batch: int, length: int, flat: bool = False) -> list[torch.Tensor]:
    """Shapes that an input of this name may have; flat: images as rows of patches."""

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=_generator(length))

    width = find(config, "hidden_size", "d_model", "n_embd", "embed_dim", "dim") or 64
    width = width if isinstance(width, int) else 64
    if main in ("pixel_values", "pixel_values_videos") or flat:
        channels = find(config, "num_channels", "in_channels", "in_chans", "image_channels", "num_input_channels") or 3
        channels = channels if isinstance(channels, int) else 3
        if flat:
            patch, temporal = find(config, "patch_size") or 14, find(config, "temporal_patch_size") or 1
            patch = patch if isinstance(patch, int) else patch[-1]
            features = [channels * patch**2 * temporal, channels * patch**2]
            many = [noise(batch * 64, x) for x in dict.fromkeys(features)]
            return [*many, *(noise(batch, 64, x) for x in dict.fromkeys(features))]
        sizes = []
        size = find(config, "image_size", "img_size", "input_size", "resolution")
        if isinstance(size, dict):
            size = [size.get("height", 64), size.get("width", 64)]
        if isinstance(size, int):
            sizes.append((size, size))
        elif isinstance(size, (list, tuple)) and len(size) == 2:
            sizes.append((int(size[0]), int(size[1])))
        patch = find(config, "patch_size")
        if isinstance(patch, int):
            sizes.append((4 * patch, 4 * patch))
        sizes += [(64, 64), (128, 128), (224, 224)]
        frames = find(config, "num_frames") or 4
        frames = frames if isinstance(frames, int) else 4
        images = [noise(batch, channels, h, w) for h, w in dict.fromkeys(sizes)]
        pairs = [noise(batch, 2, channels, h, w) for h, w in dict.fromkeys(sizes)][:1]
        videos = [noise(batch, frames, channels, h, w) for h, w in dict.fromkeys(sizes)][:2]
        videos += [noise(batch, channels, frames, h, w) for h, w in dict.fromkeys(sizes)][:1]
        return videos + images if main.endswith("videos") else images + videos + pairs
    if main == "input_features":
        mel = find(config, "num_mel_bins", "feature_size", "n_mels", "input_feat_per_channel", "input_dim") or 80
        frames = find(config, "max_source_positions") or 64
        mel, frames = (x if isinstance(x, int) else 80 for x in (mel, frames))
        return [
            noise(batch, mel, 2 * frames),
            noise(batch, 2 * frames, mel),
            noise(batch, mel, frames),
            noise(batch, 1, 2 * frames, mel),
            noise(batch, 64, 2 * mel),
        ]
    if main in ("input_values", "audio_values", "waveform", "spectrogram"):
        length = find(config, "max_length") or 128
        mel = find(config, "num_mel_bins") or 80
        shapes = [noise(batch, 8000), noise(batch, 1, 8000), noise(batch, 1, 24000)]
        if isinstance(mel, int) and isinstance(length, int):
            shapes += [noise(batch, min(length, 1024), mel), noise(batch, mel, 64)]
        return shapes
    if main == "past_values":
        channels = find(config, "num_input_channels", "input_size") or 1
        context = find(config, "context_length") or 32
        lags = find(config, "lags_sequence")
        rows = context + (max(lags) if isinstance(lags, (list, tuple)) and lags else 0)
        return [noise(batch, rows, channels), noise(batch, rows), noise(batch, 64)]
    if main in ("codes", "audio_codes", "sequences"):
        books = find(config, "num_codebooks", "num_quantizers") or 4
        ids = torch.randint(0, 16, (batch, books, length), generator=_generator(1))
        return [ids, ids.transpose(1, 2).contiguous(), ids[:, 0].contiguous()]
    if main == "inputs":
        d = find(config, "d_model") or width
        return [noise(batch, length, d), tokens(config, batch, length), noise(batch, 3, 64, 64)]
    return [noise(batch, length, width), noise(batch, width, 8, 8), noise(batch, width, length)]


def _required(name: str, config: Any, batch: int, length: int) -> Any:
    """A value for an argument without a default; None where its name says nothing."""
    if name in ("attention_mask", "padding_mask", "input_mask", "past_observed_mask"):
        return torch.ones(batch, length, dtype=torch.long)
    if name.endswith("_ids") and "image_grid" not in name:
        return tokens(config, batch, length)
    if name in ("pixel_mask",):
        return torch.ones(batch, 64, 64, dtype=torch.long)
    if name in MAINS:
        return _variants(name, config, batch, length)[0]
    if name in ("image_grid_thw", "grid_thw"):
        return torch.tensor([[1, 4, 4]])
    if name in ("past_time_features", "future_time_features"):
        return torch.randn(batch, length, 1, generator=_generator(2))
    if name in ("timestep", "timesteps", "time_step"):
        return torch.tensor([1] * batch)
    if "embeds" in name or "hidden" in name or "features" in name or "states" in name:
        width = find(config, "hidden_size", "d_model", "n_embd", "embed_dim", "dim") or 64
        return torch.randn(batch, length, width, generator=_generator(3))
    return None
