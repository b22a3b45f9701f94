"""A model in hand: built from a source with its weights, or read from a file of ours, and its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from doconv_convert.artifacts.checkpoint import load_into, load_strictly, read_checkpoint
from doconv_convert.artifacts.inputs import InputSpec, example_inputs, infer_inputs, parse_input_shape
from doconv_convert.artifacts.sources import Source, build, parse_source, pinned
from doconv_convert.errors import DoconvError, UsageError

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

    def tensors(self, batch: int) -> tuple[Tensor, ...]:
        """One tensor an input; the user's own samples are repeated up to the batch."""
        if self.own is None:
            return example_inputs(self.specs, batch, seed=0)
        return tuple(t.repeat(-(-batch // t.shape[0]), *[1] * (t.dim() - 1))[:batch] for t in self.own)

    def arguments(self, batch: int) -> tuple[Any, ...]:
        """The model's positional arguments."""
        tensors = self.tensors(batch)
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
    if weights is None or not is_checkpoint(weights):
        return Opened(build(source, weights, seed), pinned(source, weights))
    model = build(source, None, seed)
    load_strictly(model, read_checkpoint(weights).state, weights)
    return Opened(model, source)


def find_inputs(opened: Opened, shapes: Sequence[str] | None, file: Path | None) -> Inputs | None:
    """The user's samples or shapes, else what the source tells; None where nothing does. Raises UsageError."""
    if file is not None:
        own = _read_samples(file)
        return Inputs([InputSpec(name, tuple(t.shape)) for name, t in own.items()], tuple(own.values()))
    if shapes:
        return Inputs([parse_input_shape(text) for text in shapes])
    specs = infer_inputs(opened.source, opened.model)
    return None if specs is None else Inputs(specs)


def _read_samples(path: Path) -> dict[str, Tensor]:
    """One array of samples an input, batch first, from .npy or .npz."""
    try:
        content: Any = np.load(path, allow_pickle=False)
        arrays = {"": content} if isinstance(content, np.ndarray) else dict(content)
    except (OSError, ValueError) as error:
        raise DoconvError(f"'{path}' cannot be read as .npy or .npz ({error}); save it with numpy.save.") from error
    bad = next((name for name, array in arrays.items() if array.ndim == 0 or not array.size), None)
    if bad is not None or not arrays:
        raise UsageError(f"'{path}': '{bad or ''}' is no batch of samples; expected arrays with the batch first.")
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
