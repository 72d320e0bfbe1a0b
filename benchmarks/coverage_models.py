"""One model of each transformers model type, small and with random weights, and inputs that it runs with."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from benchmarks.coverage_configs import LEVELS, shrink
from benchmarks.coverage_diffusers import MODELS, build_diffuser
from benchmarks.coverage_inputs import BATCH, LENGTH, OTHER_BATCH, OTHER_LENGTH, candidates

DIFFUSERS = "diffusers"
"""The library, and the attention of its models: SDPA, whatever is asked."""

LARGEST = 120_000_000
"""Parameters; a model that stays larger when cut is not built."""


@dataclass
class Built:
    """A model that runs under eager mode: its class, its inputs, and how far its configuration was cut.

    others: makes inputs of another size; None if the model has one size.
    """

    model: torch.nn.Module
    name: str
    inputs: dict[str, Any]
    level: str
    others: Callable[[], dict[str, Any] | None]

    def on(self, device: str) -> Built:
        """The same model and inputs on a device: they are made on the CPU, and are the same numbers everywhere."""
        if device == "cpu":
            return self

        def moved(inputs: Any) -> Any:
            return pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), inputs)

        others = moved(self.others())  # before the model moves: it is run to find them
        return replace(self, model=self.model.to(device), inputs=moved(self.inputs), others=lambda: others)


class NotBuiltError(Exception):
    """No small configuration of the type builds and runs; the message says how the last tries failed."""


def model_types() -> list[str]:
    """Every model type of transformers, and ``diffusers.CLASS`` where that library is installed."""
    from transformers.models.auto import configuration_auto

    auto: Any = configuration_auto
    more = [f"{DIFFUSERS}.{name}" for name in MODELS] if importlib.util.find_spec(DIFFUSERS) else []
    return [*sorted(auto.CONFIG_MAPPING_NAMES), *more]


def model_classes(config_class: type) -> list[type]:
    """The classes that the auto mappings give for a configuration: the base model first, then those with heads."""
    from transformers.models.auto import modeling_auto

    found: list[type] = []
    mappings: list[Any] = [modeling_auto.MODEL_MAPPING, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING]
    mappings += [v for k, v in sorted(vars(modeling_auto).items()) if k.endswith("_MAPPING") and v not in mappings]
    for mapping in mappings:
        classes: Any = ()
        try:
            classes = mapping.get(config_class, ())
        except Exception:  # the model's module needs a library that is not installed
            continue
        for one in classes if isinstance(classes, (list, tuple)) else (classes,):
            if isinstance(one, type) and one not in found:
                found.append(one)
    return found


def build(model_type: str, attention: str) -> Built:
    """The first class and cut of a model type that runs."""
    if attention == DIFFUSERS:
        name = model_type.partition(".")[2]
        diffuser, inputs, others = build_diffuser(name)
        return Built(diffuser, name, inputs, "small", lambda: others)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if attention == "flex_attention":
        _flex_as_it_is()
    config_class = CONFIG_MAPPING[model_type]
    failures: list[str] = []
    classes = model_classes(config_class)
    if not classes:
        raise NotBuiltError("no model class in the auto mappings")
    for level in LEVELS:
        for one in classes[:3]:
            try:
                built = _try(one, config_class, level, attention)
            except Unsupported:
                raise
            except Exception as error:
                failures.append(f"{one.__name__} ({level}): {_line(error)}")
                continue
            return built
    raise NotBuiltError("; ".join(dict.fromkeys(failures)))


def _flex_as_it_is() -> None:
    """Let eager mode run flex_attention itself, where transformers has inductor compile a kernel for it."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations.flex_attention import WrappedFlexAttention

    WrappedFlexAttention._is_flex_compiled = True
    WrappedFlexAttention.training = False
    WrappedFlexAttention.__init__ = lambda *_: None
    WrappedFlexAttention.__call__ = lambda _: flex_attention


class Unsupported(Exception):  # noqa: N818  what the library says, not a fault
    """The model does not have this attention implementation."""


def _line(error: BaseException) -> str:
    lines = [x for x in str(error).strip().splitlines() if x.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _try(one: Any, config_class: Any, level: str, attention: str) -> Built:
    config = config_class()
    shrink(config, level)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        size = sum(p.numel() for p in one(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    try:
        model = one._from_config(config, attn_implementation=attention)
    except (ValueError, ImportError) as error:
        if "does not support an attention implementation" in str(error) or "attn_implementation" in str(error):
            raise Unsupported(_line(error)) from error
        raise
    model = model.float().eval()
    inputs = first_that_runs(model, BATCH, LENGTH)
    return Built(model, one.__name__, inputs, level, lambda: other_size(model, inputs))


def other_size(model: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """Inputs of another length, or of another batch size where nothing has a length; None if the model has one size."""
    shapes = [x.shape for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor)]
    for batch, length in ((OTHER_BATCH, OTHER_LENGTH), (BATCH + 1, LENGTH)):
        try:
            others = first_that_runs(model, batch, length)
        except NotBuiltError:
            continue
        changed = [x.shape for x in pytree.tree_leaves(others) if isinstance(x, torch.Tensor)]
        if sorted(others) == sorted(inputs) and shapes != changed:
            return others
    return None


def first_that_runs(model: torch.nn.Module, batch: int, length: int) -> dict[str, Any]:
    failures: list[str] = []
    for n, inputs in enumerate(candidates(model, batch, length)):
        if n >= 40:
            break
        try:
            with torch.no_grad():
                torch.manual_seed(0)
                outputs = model(**inputs)
            if floats(outputs):
                return inputs
            failures.append("no floating-point outputs")
        except Exception as error:
            failures.append(f"[{', '.join(k for k in inputs if k != 'use_cache')}] {_line(error)}")
    raise NotBuiltError(" | ".join(dict.fromkeys(failures)))


def tensors(outputs: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(_plain(outputs)) if isinstance(x, torch.Tensor)]


def _plain(outputs: Any) -> Any:
    """Model outputs as dictionaries, nested ones too."""
    if hasattr(outputs, "to_tuple"):
        return [_plain(x) for x in outputs.to_tuple()]
    if isinstance(outputs, dict):
        return [_plain(x) for x in outputs.values()]
    if isinstance(outputs, (list, tuple)):
        return [_plain(x) for x in outputs]
    return outputs


def floats(outputs: Any) -> list[torch.Tensor]:
    return [x for x in tensors(outputs) if x.dtype.is_floating_point]
