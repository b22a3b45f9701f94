"""A model in hand: built from a source with its weights, or read from a file of ours, and its inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from doconv_convert.artifacts.checkpoint import load_into, read_checkpoint, require_finite
from doconv_convert.artifacts.inputs import InputSpec, example_inputs, forward_names, infer_inputs, parse_input_shape
from doconv_convert.artifacts.samples import in_order, read_samples, varied
from doconv_convert.artifacts.sources import Source, build, parse_source, pinned
from doconv_convert.errors import UsageError

_CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


@dataclass(frozen=True)
class Opened:
    """A model and the source that rebuilds it."""

    model: nn.Module
    source: Source


@dataclass(frozen=True)
class Inputs:
    """Example inputs: made up from `specs` for any batch, or the user's own samples."""

    specs: Sequence[InputSpec]
    own: tuple[Tensor, ...] | None = None

    @property
    def image_list(self) -> bool:
        """Whether the model takes one list of images (torchvision's detectors)."""
        return any(not spec.batched for spec in self.specs)

    @property
    def export_batch(self) -> int:
        """Traced at 2, since 1 may be baked in; a detector takes its one image."""
        return 1 if self.image_list else 2

    @property
    def proof_batch(self) -> int:
        """Another batch than the traced one, so that a dynamic batch is seen to be one."""
        return 1 if self.image_list else 3

    def tensors(self, batch: int) -> tuple[Tensor, ...]:
        """One tensor an input (a detector: one an image); the user's own samples are filled up to the batch
        (`varied`)."""
        if self.own is None:
            specs = [*self.specs] * batch if self.image_list else self.specs
            return example_inputs(specs, batch, seed=0)
        return tuple(torch.from_numpy(varied(t.numpy(), batch)) for t in self.own)

    def arguments(self, batch: int, like: nn.Module | None = None) -> tuple[Any, ...]:
        """The model's positional arguments; floats in the dtype of the model `like`."""
        tensors = self.tensors(batch)
        dtype = next((p.dtype for p in like.parameters() if p.is_floating_point()), None) if like else None
        if dtype is not None:
            tensors = tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)
        return (list(tensors),) if self.image_list else tensors


def is_checkpoint(text: str) -> bool:
    return Path(text).suffix in _CHECKPOINT_SUFFIXES


def open_model(text: str, weights: str | None, model_args: Mapping[str, Any], seed: int) -> Opened:
    """The model of a SOURCE, with random weights, named ones or those of a checkpoint file; or a file of ours.

    Raises UsageError or DoconvError as the parts do.
    """
    if is_checkpoint(text) and ":" not in text:
        checkpoint = read_checkpoint(text)
        if checkpoint.recipe is None:
            raise UsageError(f"'{text}' has no recipe that says what model it holds; pass SOURCE --weights {text}.")
        source = checkpoint.recipe.trusted_source(text)
        return Opened(load_into(build(source), checkpoint), source)
    source = parse_source(text, model_args)
    if weights is None or not (is_checkpoint(weights) or Path(weights).is_file()):
        return Opened(build(source, weights, seed), pinned(source, weights))
    checkpoint = read_checkpoint(weights)
    require_finite(checkpoint)
    return Opened(load_into(build(source, None, seed), checkpoint), source)


def find_inputs(opened: Opened, shapes: Sequence[str] | None, file: Path | None) -> Inputs | None:
    """The user's samples or shapes, else what the source tells; None where nothing does. Raises UsageError."""
    if file is not None:
        read = read_samples(file)
        names = _argument_names(opened.model, len(read))
        own = [torch.from_numpy(array) for array in in_order(read, names, f"'{file}'")]
        return Inputs([InputSpec(name, tuple(t.shape)) for name, t in zip(names, own, strict=True)], tuple(own))
    if shapes:
        return Inputs(_in_forward_order([parse_input_shape(text) for text in shapes], opened.model))
    specs = infer_inputs(opened.source, opened.model)
    return None if specs is None else Inputs(specs)


def _in_forward_order(specs: list[InputSpec], model: nn.Module) -> list[InputSpec]:
    named = {spec.name: spec for spec in specs}
    if "" in named or len(specs) == 1:  # as the user gave them
        return specs
    return in_order(named, _argument_names(model, len(specs)), "--input-shape")


def _argument_names(model: nn.Module, count: int) -> list[str]:
    """The names of forward's first `count` arguments, or of all where it has fewer."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return forward_names(model, count)
    return forward_names(model, min(count, len(parameters)))
