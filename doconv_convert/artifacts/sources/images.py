"""An image as a sample: through the preprocessing that belongs to the weights of its source."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doconv_convert.artifacts.sources import zoos
from doconv_convert.artifacts.sources.factories import user_code
from doconv_convert.artifacts.sources.source import Source
from doconv_convert.errors import DoconvError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

_SEVERAL_IMAGES = ("video", "optical_flow")


def read_image(path: Path, source: Source, model: nn.Module) -> Tensor:
    """A batch of one. Raises UsageError where the source has no preprocessing, DoconvError for a damaged file."""
    from PIL import Image

    transform = _transform(path, source, model)
    try:
        with Image.open(path) as image:
            pixels = image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's ways to refuse a file
        raise DoconvError(
            f"'{path}' cannot be read as an image ({error}); expected a JPEG, PNG or the like."
        ) from error
    with user_code(f"the preprocessing of {source.text}"):
        sample: Tensor = transform(pixels)
    return sample[None]


def _transform(path: Path, source: Source, model: nn.Module) -> Any:
    if source.kind == "timm":
        data: Any = importlib.import_module("timm.data")
        return data.create_transform(**data.resolve_model_data_config(model), is_training=False)
    if source.kind != "torchvision":
        raise UsageError(
            f"'{path}' is an image, and '{source.text}' does not say how to preprocess one (only 'torchvision:' and "
            "'timm:' sources do); do it yourself and pass the batch: `input_file` FILE.npy."
        )
    family = zoos.torchvision_family(source.name)
    if family in _SEVERAL_IMAGES:
        raise UsageError(
            f"'{path}' is one image, but '{source.text}' takes several ({family}); pass them as `input_file` FILE.npz."
        )
    return zoos.torchvision_weights(source.name, source.variant or "DEFAULT").transforms()
