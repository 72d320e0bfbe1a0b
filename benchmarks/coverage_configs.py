"""Small configurations of any transformers model type, made by the names of a configuration's attributes.

Nothing here knows a model: widths, heads, layers, experts, vocabularies, positions and images are recognised by how
configurations call them, in nested configurations too. `LEVELS` are tried in turn, from the smallest.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

LEVELS = ("small", "wide", "layers")
"""small: widths and heads are cut, too. wide: heads keep a usual width. layers: only what repeats (layers, experts),
vocabularies and images."""

HEADS, KV_HEADS, VOCABULARY, POSITIONS, WINDOW, EXPERTS = 4, 2, 160, 128, 8, 4
HEAD_DIMS = {"small": 16, "wide": 128}

_LAYERS = re.compile(r"^(n_layers?|depth|num_blocks|(num_)?(\w+_)?layers|num_layers_\w+|resampler_depth|\w+_depth)$")
_NOT_LAYERS = re.compile(r"conv|window|shared|mtp|nextn|feature_layer|dense_layers|no_rope|iou|mlp_layers|norm")
_KV = re.compile(r"(key_value_heads|kv_heads|multi_query_group_num|num_key_value|kv_n_heads|query_groups|kv_head)")
_HEADS = re.compile(r"(^|_)(heads|n_heads?|num_heads?|nhead)$|attention_heads$|_n_heads$")
_HEAD_DIM = re.compile(r"(^|_)(head_dim|d_kv|kv_channels|d_head|head_size|dim_head|head_width)$|attention_head_dim")
_RANK = re.compile(r"lora_rank$|^(decay|a|v|gate)_low_rank|_rank$")
_FFN = re.compile(r"intermediate|(^|_)ffn|d_ff$|n_inner|mlp_dim|ff_dim|feed_?forward_(size|dim|hidden)|mlp_hidden")
_WIDTH = re.compile(
    r"(^|_)(hidden_size|d_model|n_embd|embed_dim|embedding_size|hidden_dim|emb_dim|dim|width|embedding_dim|"
    r"projection_dim|d_embed|word_embed_proj_dim|model_dim|hidden_channels|output_dim|lm_embed_dim)$"
)
_NOT_WIDTH = re.compile(r"codebook|conv_|rotary|quantiz|codevector|patch|position|state|time_|latent|vq|input_dim")
_EXPERTS = re.compile(r"(^|_)(num_experts|n_routed_experts|num_local_experts|moe_num_experts|n_experts)$")
_PER_TOKEN = re.compile(r"experts_per_tok|top_?k(_experts)?$|moe_k$|num_selected_experts")
_GROUPS = re.compile(r"^(n_group|topk_group|num_expert_group|moe_topk_group|topk_groups)$")
_VOCAB = re.compile(r"(^|_)vocab_size(_per_layer_input)?$|^vocabulary_size$|^n_vocab$|^n_words$")
_TOKEN = re.compile(r"(_token_id|_token_index|_token_ids|_token|_id)$|^token_id")
_FIXED_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_POSITIONS = re.compile(r"(max_\w*positions?(_embeddings)?|n_positions|n_ctx|max_seq_len(gth)?|max_sequence_length)$")
_WINDOW = re.compile(r"(sliding_window(_size)?|local_attention|attention_chunk_size|local_window_size)$")
_ROTARY = re.compile(r"^(rotary_dim|rotary_ndims|rope_head_dim|rotary_emb_dim)$")
_INDICES = re.compile(r"ind(ex|ic)|idx|_layers|_blocks|blocks$")
_FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "num_kv_shared_layers")
_ZERO = re.compile(r"drop|_pdrop|mask_(time|feature)_prob|noise_(prob|std|scale)|jitter|layerdrop|label_noise")


def attributes(config: Any) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in list(vars(config).items()) if not k.startswith("_")]


def sub_configs(config: Any) -> Iterator[Any]:
    """The configurations held by another, in attributes or lists of them."""
    for _, value in attributes(config):
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if hasattr(one, "to_dict") and hasattr(one, "model_type"):
                yield one


def shrink(config: Any, level: str, tokens: dict[str, int] | None = None) -> None:
    """Cut a configuration down in place, and those inside it."""
    tokens = {} if tokens is None else tokens
    for sub in sub_configs(config):
        shrink(sub, level, tokens)
    _cut_layers(config)
    values = dict(attributes(config))
    staged = any(isinstance(v, (list, tuple)) and "depth" in k for k, v in values.items()) or any(
        k in values for k in ("blocks_per_stage", "hidden_sizes", "embed_dim_per_stage")
    )
    head_dim = 0 if staged else HEAD_DIMS.get(level, 0)
    grouped = _grouped(values)
    state_space = any("state_size" in k or "d_state" in k for k in values)
    for name, value in values.items():
        new = _number(name, value, head_dim, grouped, state_space, tokens)
        if new is not None and new != value:
            _set(config, name, new)
    for name, value in values.items():
        if isinstance(value, dict) and "rope" in name and head_dim:
            _cut_rope(value, _head_dim(values), head_dim)
    _cut_images(config, values)


def _grouped(values: dict[str, Any]) -> bool:
    heads = [v for k, v in values.items() if _HEADS.search(k) and not _KV.search(k) and isinstance(v, int)]
    shared = [v for k, v in values.items() if _KV.search(k) and isinstance(v, int)]
    return bool(heads and shared and min(shared) < max(heads))


def _set(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except Exception:  # a property, or a value that the configuration's own validation refuses
        return


def _number(
    name: str,
    value: Any,
    head_dim: int,
    grouped: bool,
    state_space: bool,
    tokens: dict[str, int],
) -> Any:
    """The small value of one attribute; None leaves it. head_dim: 0 leaves widths and heads as they are."""
    if isinstance(value, bool):
        return False if name == "use_cache" and value else None
    if value is None:
        return _missing(name, head_dim)
    if isinstance(value, float) and _ZERO.search(name):
        return 0.0
    if isinstance(value, (int, float)) and name in ("mask_time_prob", "mask_feature_prob"):
        return 0.0
    if isinstance(value, (list, tuple)):
        if _TOKEN.search(name) and value and all(isinstance(x, int) for x in value):
            return type(value)(min(x, 2) for x in value)
        return None
    if not isinstance(value, int):
        return None
    if _VOCAB.search(name):
        return VOCABULARY if value > VOCABULARY else None
    if _TOKEN.search(name):
        if name in _FIXED_TOKENS:
            return _FIXED_TOKENS[name]
        if value >= VOCABULARY - 40:
            return tokens.setdefault(name, VOCABULARY - 1 - len(tokens))
        return None
    if _EXPERTS.search(name):
        return min(value, EXPERTS)
    if _PER_TOKEN.search(name):
        return min(value, 2)
    if _GROUPS.search(name):
        return 1
    if _WINDOW.search(name):
        return min(value, WINDOW)
    if _POSITIONS.search(name):
        return min(value, POSITIONS)
    if name in ("num_queries", "num_object_queries", "num_denoising"):
        return min(value, 8)
    if not head_dim or value <= 1:
        return None
    if name.startswith("linear_num_"):
        return 2 if "key" in name else 4
    if (name.startswith("mamba") and _HEADS.search(name)) or (state_space and name in ("num_heads", "n_heads")):
        return 8
    if _KV.search(name):
        return (KV_HEADS if grouped else HEADS) if value > 1 else value
    if _HEADS.search(name):
        return min(value, HEADS)
    if name == "qk_head_dim":
        return 2 * head_dim
    if _HEAD_DIM.search(name):
        return min(value, head_dim)
    if _ROTARY.search(name):
        return min(value, head_dim)
    if _RANK.search(name):
        return min(value, 2 * head_dim)
    if _FFN.search(name):
        return min(value, 128 if head_dim < 128 else HEADS * head_dim)
    if _WIDTH.search(name) and not _NOT_WIDTH.search(name):
        return HEADS * head_dim if value >= 64 else None
    return None


def _missing(name: str, head_dim: int) -> Any:
    """Values for what some default configurations leave open and the model then needs."""
    if name == "vocab_size":
        return VOCABULARY
    if name == "prediction_length":
        return 8
    if _PER_TOKEN.search(name):
        return 2
    if _GROUPS.search(name):
        return 1
    if head_dim and name == "head_dim":
        return head_dim
    if head_dim and name == "num_key_value_heads":
        return KV_HEADS
    return None


def _cut_rope(rope: dict[str, Any], before: int, now: int) -> None:
    """Sections of multi-axis rotary embeddings are shares of a head's width."""
    for key, value in rope.items():
        if isinstance(value, dict):
            _cut_rope(value, before, now)
        if "section" in key and isinstance(value, list) and before > now:
            want = max(len(value), sum(value) * now // before)
            cut = [max(1, v * want // sum(value)) for v in value]
            cut[0] += want - sum(cut)
            rope[key] = cut


def _head_dim(values: dict[str, Any]) -> int:
    """The width of a head before anything was cut; 0 where it can't be told."""
    given = values.get("head_dim")
    if isinstance(given, int):
        return given
    width = next((values[k] for k in ("hidden_size", "d_model", "n_embd", "embed_dim") if k in values), None)
    heads = next((values[k] for k in ("num_attention_heads", "n_head", "num_heads") if k in values), None)
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads else 0


def _cut_layers(config: Any) -> None:
    """Two layers, or as many as there are kinds of layers (four at most); lists with one entry a layer follow."""
    values = dict(attributes(config))
    counts = {
        k: v
        for k, v in values.items()
        if isinstance(v, int) and not isinstance(v, bool) and v > 2 and _LAYERS.search(k) and not _NOT_LAYERS.search(k)
    }
    for name, value in values.items():
        if name in ("depths", "blocks_per_stage", "num_blocks") and _integers(value):
            _set(config, name, type(value)(min(x, 2) for x in value))
    for count in sorted(set(counts.values()), reverse=True):
        listed = {
            k: v
            for k, v in values.items()
            if isinstance(v, (list, tuple)) and len(v) == count and all(not hasattr(x, "to_dict") for x in v)
        }
        keep = kinds(list(zip(*listed.values(), strict=True))) if listed else [0, 1]
        for name, value in listed.items():
            _set(config, name, type(value)(value[n] for n in keep))
        for name, value in counts.items():
            if value == count:
                _set(config, name, len(keep))
        for name, value in values.items():
            indices = name not in listed and "out_" not in name and _integers(value) and _INDICES.search(name)
            if indices and min(value) >= 0 and len(keep) <= max(value) <= count:
                _set(config, name, type(value)([1] if len(value) < 8 else range(len(keep))))
    for name, value in values.items():
        if name in _FIRST_LAYERS and isinstance(value, int) and value > 1:
            _set(config, name, 1 if "shared" not in name else 0)
    if "stage_names" in values or "_out_indices" in vars(config):
        _last_stage(config)


def _integers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(type(x) is int for x in value)


def kinds(layers: Sequence[tuple[Any, ...]]) -> list[int]:
    """Indices of the first layer of each kind, in order; at least two and at most four."""
    first: dict[str, int] = {}
    for n, layer in enumerate(layers):
        first.setdefault(repr(layer), n)
    chosen = sorted(first.values())[:4]
    return chosen if len(chosen) > 1 else [*chosen, *(n for n in range(len(layers)) if n not in chosen)][:2]


def _last_stage(config: Any) -> None:
    """A backbone returns its last stage, whatever the number of stages is now."""
    layers = getattr(config, "num_hidden_layers", None)
    stages = len(config.depths) if isinstance(getattr(config, "depths", None), (list, tuple)) else layers
    if not isinstance(stages, int):
        return
    names = ["stem", *(f"stage{n}" for n in range(1, stages + 1))]
    wanted = len(getattr(config, "out_indices", None) or [1])
    chosen = list(range(max(0, stages + 1 - wanted), stages + 1))
    if wanted > len(chosen):
        chosen = sorted((chosen * wanted)[:wanted])
    _set(config, "stage_names", names)
    with contextlib.suppress(AttributeError, TypeError, ValueError):  # no backbone, or its stages are fixed
        config.set_output_features_output_indices(out_features=None, out_indices=chosen)


def _cut_images(config: Any, values: dict[str, Any]) -> None:
    patch = values.get("patch_size")
    patch = patch if isinstance(patch, int) else patch[-1] if isinstance(patch, (list, tuple)) and patch else None
    staged = "depths" in values or "hidden_sizes" in values
    side = 128 if staged else 64 if patch is None else 4 * patch  # the last of five stages still has several positions
    window = values.get("window_size")
    if staged and isinstance(window, int) and window > 4:  # windows smaller than the image in every stage
        _set(config, "window_size", 4)
    for name in ("image_size", "img_size", "input_size", "resolution"):
        value = values.get(name)
        if isinstance(value, int) and value > side:
            _set(config, name, side)
        elif isinstance(value, (list, tuple)) and value and all(isinstance(x, int) and x > side for x in value):
            _set(config, name, type(value)([side] * len(value)))
        elif isinstance(value, dict) and {"height", "width"} <= set(value):
            _set(config, name, {**value, "height": side, "width": side})
    if isinstance(values.get("image_embedding_size"), int) and patch:
        _set(config, "image_embedding_size", side // patch)
    if isinstance(values.get("num_frames"), int) and values["num_frames"] > 4:
        _set(config, "num_frames", 4)
