"""The user's own samples, from .npy or .npz. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from doconv_convert.errors import DoconvError, UsageError

Array = npt.NDArray[Any]

# Of the sample's own spread: far above any rounding, and still the user's picture.
NOISE = 0.1
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def is_image(path: Path) -> bool:
    return path.suffix.lower() in _IMAGE_SUFFIXES


def read_samples(path: Path) -> dict[str, Array]:
    """One array of samples an input, batch first, by the input's name; '' is the name in an .npy.

    float64, numpy's default, becomes float32. Raises DoconvError for a file that cannot be read, UsageError
    for what is no batch.
    """
    if is_image(path):
        raise UsageError(f"'{path}' is an image; how to preprocess it is not known here: pass the batch as FILE.npy.")
    try:
        content: Any = np.load(path, allow_pickle=False)
        arrays = {"": content} if isinstance(content, np.ndarray) else dict(content)
    except Exception as error:  # numpy and zipfile raise many kinds for a file of another kind
        raise DoconvError(f"'{path}' cannot be read as .npy or .npz ({error}); save it with numpy.save.") from error
    bad = next((name for name, array in arrays.items() if array.ndim == 0 or not array.size), None)
    if bad is not None or not arrays:
        raise UsageError(f"'{path}': '{bad or ''}' is no batch of samples; expected arrays with the batch first.")
    return {name: array.astype(np.float32) if array.dtype == np.float64 else array for name, array in arrays.items()}


def in_order(named: Mapping[str, Any], names: Sequence[str], what: str) -> list[Any]:
    """The values in the order of the inputs `names`; a single one, or unnamed ones, as they come.

    Raises UsageError where the number or a name is wrong.
    """
    if len(named) != len(names):
        raise UsageError(f"{what}: got {len(named)} inputs, expected {len(names)} ({', '.join(names)}).")
    if len(named) == 1:
        return list(named.values())
    if set(named) != set(names):
        raise UsageError(f"{what}: got the inputs {', '.join(named)}, expected {', '.join(names)}.")
    return [named[name] for name in names]


def fill_batch(samples: Array, batch: int) -> Array:
    """A batch made of the user's samples. What is missing is made up from them by `perturbed`: equal samples could
    not show whether the model looks at its input."""
    made = list(samples[:batch])
    for index in range(len(samples), batch):
        made.append(perturbed(samples[index % len(samples)], seed=index))
    return np.stack(made)


def perturbed(array: Array, seed: int) -> Array:
    """The same sample a little different: with noise, or rolled where it holds no floats."""
    if not np.issubdtype(array.dtype, np.floating):
        return np.roll(array, seed, axis=-1) if array.ndim else array
    noise = np.random.default_rng(seed).standard_normal(array.shape) * NOISE * (float(array.std()) or 1.0)
    changed: Array = (array + noise).astype(array.dtype)
    return changed
