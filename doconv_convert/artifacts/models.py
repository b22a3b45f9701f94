"""A model in hand: built from a source with its weights, or read from a file of ours, and its inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from doconv_convert.artifacts.checkpoint import fitted, load_into
from doconv_convert.artifacts.images import read_image
from doconv_convert.artifacts.inputs import (
    InputSpec,
    example_inputs,
    forward_names,
    infer_inputs,
    parse_input_shape,
    takes_image_list,
)
from doconv_convert.artifacts.programs import fixed_batch, untied_notes
from doconv_convert.artifacts.reading import INDEX_SUFFIX, read_checkpoint, require_finite
from doconv_convert.artifacts.samples import in_order, is_image, read_samples, varied
from doconv_convert.artifacts.selection import Selection
from doconv_convert.artifacts.sources import Source, build, parse_source, pinned
from doconv_convert.errors import UsageError

_CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


@dataclass(frozen=True)
class Opened:
    """A model, the source that rebuilds it, and what the user should know of it."""

    model: nn.Module
    source: Source
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inputs:
    """Example inputs: made up from `specs` for any batch, or the user's own samples. `fixed_batch` is the only
    batch that the model takes (an exported program's)."""

    specs: Sequence[InputSpec]
    own: tuple[Tensor, ...] | None = None
    fixed_batch: int | None = None

    @property
    def image_list(self) -> bool:
        """Whether the model takes one list of images (torchvision's detectors)."""
        return any(not spec.batched for spec in self.specs)

    @property
    def export_batch(self) -> int:
        """Traced at 2, since 1 may be baked in; a detector takes its one image."""
        return self.fixed_batch or (1 if self.image_list else 2)

    @property
    def proof_batch(self) -> int:
        """Another batch than the traced one, so that a dynamic batch is seen to be one."""
        return self.fixed_batch or (1 if self.image_list else 3)

    def tensors(self, batch: int) -> tuple[Tensor, ...]:
        """One tensor an input (a detector: one an image); the user's own samples are filled up to the batch
        (`varied`)."""
        if self.own is None:
            specs = [*self.specs] * batch if self.image_list else self.specs
            return example_inputs(specs, batch, seed=0)
        filled = [torch.from_numpy(varied(t.numpy(), batch)) for t in self.own]
        return tuple(filled[0]) if self.image_list else tuple(filled)

    def resized(self, sizes: Sequence[Mapping[int, int]]) -> Inputs:
        """Inputs like these, with other sizes: per input {axis: size}. The user's samples are repeated or cut."""
        specs = [
            replace(spec, shape=tuple(axes.get(axis, size) for axis, size in enumerate(spec.shape)))
            for spec, axes in zip(self.specs, sizes, strict=True)
        ]
        if self.own is None:
            return replace(self, specs=specs)
        own = []
        for tensor, axes, spec in zip(self.own, sizes, self.specs, strict=True):
            for axis, size in axes.items():
                place = axis if spec.batched else axis + 1
                tensor = tensor.index_select(place, torch.arange(size) % tensor.shape[place])
            own.append(tensor)
        return replace(self, specs=specs, own=tuple(own))

    def arguments(self, batch: int, like: nn.Module | None = None) -> tuple[Any, ...]:
        """The model's positional arguments; floats in the dtype of the model `like`."""
        tensors = self.tensors(batch)
        dtype = next((p.dtype for p in like.parameters() if p.is_floating_point()), None) if like else None
        if dtype is not None:
            tensors = tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)
        return (list(tensors),) if self.image_list else tensors


def is_checkpoint(text: str) -> bool:
    """Whether a text names a checkpoint: by its suffix, or being a folder or an index of shards."""
    return Path(text).suffix in _CHECKPOINT_SUFFIXES or text.endswith(INDEX_SUFFIX) or Path(text).is_dir()


def open_model(
    text: str,
    weights: str | None,
    model_args: Mapping[str, Any],
    seed: int,
    selection: Selection | None = None,
) -> Opened:
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
        model = build(source, weights, seed)
        return Opened(model, pinned(source, weights), notes_on(source, model))
    checkpoint = read_checkpoint(weights, selection)
    require_finite(checkpoint)
    model = build(source, None, seed)
    checkpoint = fitted(checkpoint, model)
    notes = (*checkpoint.notes, *notes_on(source, model))
    return Opened(load_into(model, checkpoint), source, notes)


def notes_on(source: Source, model: nn.Module) -> tuple[str, ...]:
    """What the user should know of a model just built."""
    return untied_notes(model) if source.kind == "program" else ()


def find_inputs(opened: Opened, shapes: Sequence[str] | None, file: Path | None) -> Inputs | None:
    """The user's samples or shapes, else what the source tells; None where nothing does. Raises UsageError."""
    fixed = fixed_batch(opened.model) if opened.source.kind == "program" else None
    if file is not None:
        return replace(_own_samples(opened, file), fixed_batch=fixed)
    if shapes:
        specs = _in_forward_order([parse_input_shape(text) for text in shapes], opened.model)
        return Inputs(specs, fixed_batch=fixed)
    inferred = infer_inputs(opened.source, opened.model)
    return None if inferred is None else Inputs(inferred, fixed_batch=fixed)


def _own_samples(opened: Opened, file: Path) -> Inputs:
    if is_image(file):
        own = [read_image(file, opened.source, opened.model)]
        names = _argument_names(opened.model, 1)
    else:
        read = read_samples(file)
        names = _argument_names(opened.model, len(read))
        own = [torch.from_numpy(array) for array in in_order(read, names, f"'{file}'")]
    specs = [InputSpec(name, tuple(t.shape)) for name, t in zip(names, own, strict=True)]
    if takes_image_list(opened.source):
        specs = [replace(spec, shape=spec.shape[1:], batched=False) for spec in specs]
    return Inputs(specs, tuple(own))


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
