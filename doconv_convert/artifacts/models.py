"""A model in hand: built from a source with its weights, or read from a file of ours, and its inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from doconv_convert.artifacts.checkpoints.checkpoint import fitted, load_into
from doconv_convert.artifacts.checkpoints.reading import INDEX_SUFFIX, read_checkpoint, require_finite
from doconv_convert.artifacts.checkpoints.unwrap import Selection
from doconv_convert.artifacts.sources.images import read_image
from doconv_convert.artifacts.sources.inputs import (
    Inputs,
    InputSpec,
    forward_names,
    infer_inputs,
    parse_input_shape,
    takes_image_list,
)
from doconv_convert.artifacts.sources.programs import fixed_batch, untied_notes
from doconv_convert.artifacts.sources.samples import in_order, is_image, read_samples
from doconv_convert.artifacts.sources.source import Source, build, parse_source, pinned
from doconv_convert.errors import UsageError

_CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


@dataclass(frozen=True)
class SourceModel:
    """A model, the source that rebuilds it, and what the user should know of it."""

    model: nn.Module
    source: Source
    notes: tuple[str, ...] = ()


def is_checkpoint(text: str) -> bool:
    """Whether a text names a checkpoint: by its suffix, or being a folder or an index of shards."""
    return Path(text).suffix in _CHECKPOINT_SUFFIXES or text.endswith(INDEX_SUFFIX) or Path(text).is_dir()


def open_model(
    text: str,
    weights: str | None,
    model_args: Mapping[str, Any],
    seed: int,
    selection: Selection | None = None,
) -> SourceModel:
    """The model of a SOURCE, with random weights, named ones or those of a checkpoint file; or a file of ours.

    Raises UsageError or DoconvError as the parts do.
    """
    if is_checkpoint(text) and ":" not in text:
        checkpoint = read_checkpoint(text)
        if checkpoint.recipe is None:
            raise UsageError(f"'{text}' has no recipe that says what model it holds; pass SOURCE `weights` {text}.")
        source = checkpoint.recipe.trusted_source(text)
        return SourceModel(load_into(build(source), checkpoint), source)
    source = parse_source(text, model_args)
    if weights is None or not (is_checkpoint(weights) or Path(weights).is_file()):
        model = build(source, weights, seed)
        return SourceModel(model, pinned(source, weights), notes_on(source, model))
    checkpoint = read_checkpoint(weights, selection)
    require_finite(checkpoint)
    model = build(source, None, seed)
    checkpoint = fitted(checkpoint, model)
    notes = (*checkpoint.notes, *notes_on(source, model))
    return SourceModel(load_into(model, checkpoint), source, notes)


def notes_on(source: Source, model: nn.Module) -> tuple[str, ...]:
    """What the user should know of a model just built."""
    return untied_notes(model) if source.kind == "program" else ()


def find_inputs(opened: SourceModel, shapes: Sequence[str] | None, file: Path | None) -> Inputs | None:
    """The user's samples or shapes, else what the source tells; None where nothing does. Raises UsageError."""
    fixed = fixed_batch(opened.model) if opened.source.kind == "program" else None
    if file is not None:
        return replace(_own_samples(opened, file), fixed_batch=fixed)
    if shapes:
        specs = _in_forward_order([parse_input_shape(text) for text in shapes], opened.model)
        return Inputs(specs, fixed_batch=fixed)
    inferred = infer_inputs(opened.source, opened.model)
    return None if inferred is None else Inputs(inferred, fixed_batch=fixed)


def _own_samples(opened: SourceModel, file: Path) -> Inputs:
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
    return Inputs(specs, tuple(own), origin=file.name)


def _in_forward_order(specs: list[InputSpec], model: nn.Module) -> list[InputSpec]:
    named = {spec.name: spec for spec in specs}
    if "" in named or len(specs) == 1:  # as the user gave them
        return specs
    return in_order(named, _argument_names(model, len(specs)), "`input_shapes`")


def _argument_names(model: nn.Module, count: int) -> list[str]:
    """The names of forward's first `count` arguments, or of all where it has fewer."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return forward_names(model, count)
    return forward_names(model, min(count, len(parameters)))
