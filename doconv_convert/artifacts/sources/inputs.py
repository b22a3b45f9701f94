"""What a model takes: its inputs' names and shapes, and example values that make a network react.

Shapes come from the user, from the model's own metadata (torchvision, timm) or from a constant INPUT_SHAPE
beside a factory. Nothing is guessed from the layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from doconv_convert.artifacts.sources.factories import load_module
from doconv_convert.artifacts.sources.programs import example_shape, placeholders
from doconv_convert.artifacts.sources.samples import fill_batch
from doconv_convert.artifacts.sources.source import Source
from doconv_convert.artifacts.sources.zoos import torchvision_family, torchvision_weights
from doconv_convert.errors import DoconvError, UsageError
from doconv_convert.words import counted

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

DETECTION_SIZE = 320
SEGMENTATION_SIZE = 256  # the weights' own 520 costs four times as much and shows nothing more
VIDEO_FRAMES = 16
RAFT_SIZE = 128  # its smallest
CHUNK = 3 * 3 * 224 * 224  # elements that go through a model at once: as many as three photographs


@dataclass(frozen=True)
class InputSpec:
    """One input: `shape` has the batch first, unless `batched` is False (one image of a list of images)."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    batched: bool = True


@dataclass(frozen=True)
class Inputs:
    """Example inputs: made up from `specs` for any batch, or the user's own samples, from `origin`. `fixed_batch` is
    the only batch that the model takes (an exported program's)."""

    specs: Sequence[InputSpec]
    own: tuple[Tensor, ...] | None = None
    fixed_batch: int | None = None
    origin: str = "your samples"

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

    @property
    def own_samples(self) -> int:
        """How many samples the user gave."""
        return max((len(tensor) for tensor in self.own or ()), default=0)

    def further(self, batch: int, *, filled: bool) -> list[tuple[Inputs, int]]:
        """The user's samples behind the first `batch`, as inputs of so many or, of small ones, more, each with its
        batch; `filled` keeps to that batch, and fills the last up."""
        elements = max((tensor[0].numel() for tensor in self.own or ()), default=1)
        size = batch if filled else max(batch, CHUNK // elements)
        chunks = []
        for start in range(batch, self.own_samples, size):
            own = tuple(tensor[start : start + size] if len(tensor) > start else tensor for tensor in self.own or ())
            chunks.append((replace(self, own=own), size if filled else min(size, self.own_samples - start)))
        return chunks

    def describe(self, batch: int) -> str:
        """What a proof at `batch` compares: "3 random samples of 3x224x224 (seed 0)", "cat.npy: 5 of 5 samples"."""
        shapes = ["x".join(map(str, spec.shape[1:] if spec.batched else spec.shape)) or "1" for spec in self.specs]
        if self.own is None:
            named = zip(self.specs, shapes, strict=True)
            what = shapes[0] if len(shapes) == 1 else ", ".join(f"{spec.name} {shape}" for spec, shape in named)
            return f"{counted(batch, 'random sample')} of {what} (seed 0)"
        made = batch - self.own_samples
        also = f", and {made} made from them by adding noise" if made > 0 else ""
        return f"{self.origin}: {self.own_samples} of {counted(self.own_samples, 'sample')}{also}"

    def tensors(self, batch: int) -> tuple[Tensor, ...]:
        """One tensor an input (a detector: one an image); the user's own samples are filled up to the batch
        (`fill_batch`)."""
        if self.own is None:
            specs = [*self.specs] * batch if self.image_list else self.specs
            return example_inputs(specs, batch, seed=0)
        import torch

        filled = [torch.from_numpy(fill_batch(t.numpy(), batch)) for t in self.own]
        return tuple(filled[0]) if self.image_list else tuple(filled)

    def resized(self, sizes: Sequence[Mapping[int, int]]) -> Inputs:
        """Inputs like these, with other sizes: per input {axis: size}. The user's samples are repeated or cut."""
        specs = [
            replace(spec, shape=tuple(axes.get(axis, size) for axis, size in enumerate(spec.shape)))
            for spec, axes in zip(self.specs, sizes, strict=True)
        ]
        if self.own is None:
            return replace(self, specs=specs)
        import torch

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


def parse_input_shape(text: str) -> InputSpec:
    """Reads '1,3,224,224' or 'name=1,3,224,224'; without a name the spec's name is '' (see `forward_names`).

    Raises UsageError for anything else.
    """
    name, equals, shape = text.rpartition("=")
    sizes = [size.strip() for size in shape.split(",")]
    good = all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes)
    if not good or (equals and not name.strip()):
        raise UsageError(
            f"input shape '{text}' is not understood: expected positive sizes with the batch first, "
            "such as '1,3,224,224' or 'NAME=1,3,224,224'"
        )
    return InputSpec(name.strip(), tuple(int(size) for size in sizes))


def forward_names(model: nn.Module, count: int) -> list[str]:
    """The names of the first `count` arguments of `model.forward`; `input_0`, ... where it names none."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind in positional]
    if len(names) >= count:
        return names[:count]
    return ["input"] if count == 1 else [f"input_{index}" for index in range(count)]


def infer_inputs(source: Source, model: nn.Module) -> list[InputSpec] | None:
    """The inputs that `model` (built from `source`) takes; None where the source does not tell. The batch is 1, a
    program's is its own.

    Raises DoconvError where a factory's INPUT_SHAPE is not a tuple of positive whole numbers.
    """
    if source.kind == "torchvision":
        return _torchvision_inputs(source, model)
    if source.kind == "program":
        return _program_inputs(model)
    shape = _timm_shape(source.args, model) if source.kind == "timm" else _declared_shape(source)
    return None if shape is None else [InputSpec(forward_names(model, 1)[0], shape)]


def example_inputs(specs: Sequence[InputSpec], batch: int, seed: int) -> tuple[Tensor, ...]:
    """One random CPU tensor per spec, (batch, *shape[1:]), or `shape` itself where the spec is not batched.

    Every sample is a low-frequency pattern plus noise with its own mean and contrast, about unit variance: a
    network answers differently to each. The global random state is not touched. Raises UsageError for a dtype
    that is not floating, whose meaningful values only the user knows.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    return tuple(_example(spec, batch, generator) for spec in specs)


def _example(spec: InputSpec, batch: int, generator: Generator) -> Tensor:
    import torch

    dtype = getattr(torch, spec.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(
            f"no example can be made up for input '{spec.name}': got dtype '{spec.dtype}', expected a "
            "floating one; pass `input_file` FILE"
        )
    if not spec.batched:
        return _sample(spec.shape, generator).to(dtype)
    return torch.stack([_sample(spec.shape[1:], generator) for _ in range(batch)]).to(dtype)


def _sample(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """One image-like sample (channels, *positions) in float32."""
    import torch
    from torch.nn.functional import interpolate

    sample = torch.randn(shape, generator=generator)
    positions = shape[1:]
    if 1 <= len(positions) <= 3:
        coarse = torch.randn((1, shape[0], *(min(4, size) for size in positions)), generator=generator)
        mode = ("linear", "bilinear", "trilinear")[len(positions) - 1]
        pattern = interpolate(coarse, size=positions, mode=mode, align_corners=True)[0]
        sample = 0.6 * sample + 0.8 * pattern / pattern.square().mean().sqrt().clamp_min(1e-3)
    levels: list[float] = torch.rand(2, generator=generator).tolist()
    return sample * (0.5 + levels[0]) + (levels[1] - 0.5)


def takes_image_list(source: Source) -> bool:
    """Whether the model's one argument is a list of images: torchvision's detectors."""
    return source.kind == "torchvision" and torchvision_family(source.name) == "detection"


def _torchvision_inputs(source: Source, model: nn.Module) -> list[InputSpec]:
    family = torchvision_family(source.name)
    if family == "detection":
        return [InputSpec("images", (3, DETECTION_SIZE, DETECTION_SIZE), batched=False)]
    if family == "optical_flow":
        return [InputSpec(name, (1, 3, RAFT_SIZE, RAFT_SIZE)) for name in forward_names(model, 2)]
    name = forward_names(model, 1)[0]
    if family == "segmentation":
        return [InputSpec(name, (1, 3, SEGMENTATION_SIZE, SEGMENTATION_SIZE))]
    crop = torchvision_weights(source.name, source.variant or "DEFAULT").transforms().crop_size
    if family == "video":
        return [InputSpec(name, (1, 3, VIDEO_FRAMES, crop[0], crop[-1]))]
    # the vision transformers are built for one size: an argument or an attribute; vit_h_14's weights are for another
    size = source.args.get("image_size", source.args.get("input_size", getattr(model, "image_size", crop)))
    return [InputSpec(name, (1, 3, *_pair(size)))]


def _program_inputs(model: nn.Module) -> list[InputSpec] | None:
    examples = [(name, example_shape(example), example.dtype) for name, example in placeholders(model)]
    if not examples or any(shape is None for _, shape, _ in examples):
        return None
    return [InputSpec(name, shape or (), str(dtype).removeprefix("torch.")) for name, shape, dtype in examples]


def _timm_shape(args: Mapping[str, Any], model: nn.Module) -> tuple[int, ...] | None:
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not config.get("input_size"):
        return None
    channels, *size = config["input_size"]
    return (1, args.get("in_chans", channels), *_pair(args.get("img_size", size)))


def _declared_shape(source: Source) -> tuple[int, ...] | None:
    shape = getattr(load_module(source.place), "INPUT_SHAPE", None)
    if shape is None:
        return None
    if not isinstance(shape, tuple) or not shape or not all(type(n) is int and n > 0 for n in shape):
        raise DoconvError(
            f"INPUT_SHAPE beside '{source.text}' must be a tuple of positive whole numbers with the "
            f"batch first, such as (1, 3, 224, 224), got {shape!r}"
        )
    return (1, *shape[1:])


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[-1])
