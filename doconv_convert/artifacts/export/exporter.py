"""A PyTorch model becomes an ONNX file.

torch's dynamo exporter serves everything but torchvision's detectors, which it cannot trace: those, and
models that contain one, go through TorchScript. What the file says of itself (opset, dynamic dimensions) is
read back from it: the exporters do not always do what they were asked.
"""

from __future__ import annotations

import io
import logging
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from doconv_convert.artifacts.export import onnx_file
from doconv_convert.artifacts.export.output_names import name_by_key, own_outputs, plain_outputs
from doconv_convert.artifacts.sources.inputs import forward_names
from doconv_convert.errors import DoconvError, UsageError
from doconv_convert.files import check_writable
from doconv_convert.rewrite.tracing import set_eval_mode
from doconv_convert.words import listed

Exporter = Literal["dynamo", "torchscript"]
Axes = dict[int, str]

logger = logging.getLogger(__name__)

TORCHSCRIPT_OPSET = 18
BATCH = "batch"


@dataclass(frozen=True)
class ExportReport:
    """What the saved file says of itself. A dynamic dimension is its name, '?' where it has none."""

    path: str
    opset: int
    inputs: list[tuple[str, list[int | str]]]
    outputs: list[tuple[str, list[int | str]]]
    exporter: Exporter
    dynamic_batch: bool
    external_data: bool


def export_onnx(
    module: nn.Module,
    example_inputs: tuple[Any, ...],
    path: str | Path,
    *,
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool = True,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
) -> ExportReport:
    """Exports `module` in eval mode to the file `path`, in this process, in one step; the same model gives the same
    bytes.

    `example_inputs` are forward's positional arguments, of batch 2 or more where the batch is dynamic; every
    tensor in them is an input, named by `input_names` or like forward's arguments; `output_names` name the outputs.
    Dynamic are, with `dynamic_batch`, the first dimension of those that share the first tensor's batch, unless the
    exporter refuses it (then the file is static: see the report), and what `dynamic` asks for: {input name: {axis:
    dimension name}}, which must succeed. `opset` None is the exporter's own.

    Raises UsageError for names and axes that do not fit the inputs, DoconvError where the exporter fails or
    falls short of the opset or of `dynamic`, or where the place cannot be written.
    """
    target = Path(path)
    check_writable(target)
    tensors = _named_tensors(module, example_inputs, input_names)
    asked = _asked_axes(tensors, dynamic)
    with _evaluating(module), _quiet(), torch.no_grad():
        if _is_or_holds_a_detector(module):
            logger.info("%s is or holds a detector of torchvision: TorchScript's exporter", type(module).__name__)
            exporter: Exporter = "torchscript"
            batch_axes: dict[str, Axes] = {}
            opset = opset or TORCHSCRIPT_OPSET
            model = _torchscript(module, example_inputs, tensors, asked, opset, output_names)
        else:
            exporter = "dynamo"
            batch_axes = _batch_axes(tensors) if dynamic_batch else {}
            model = _dynamo(module, example_inputs, tensors, batch_axes, asked, opset, output_names)
        onnx_file.strip(model)
        _require(model, opset, asked)
        onnx_file.write(model, target)
    header = onnx_file.read_header(target)
    shapes = dict(header.inputs)
    dynamic_now = bool(batch_axes) and all(isinstance(shapes[name][0], str) for name in batch_axes)
    return ExportReport(
        str(target), header.opset, header.inputs, header.outputs, exporter, dynamic_now, header.external_data
    )


def _dynamo(
    module: nn.Module,
    inputs: tuple[Any, ...],
    tensors: Mapping[str, Tensor],
    batch_axes: dict[str, Axes],
    asked: dict[str, Axes],
    opset: int | None,
    output_names: Sequence[str] | None,
) -> ir.Model:
    # the exporter takes a dict in the last place for keyword arguments; an empty one behind it shields it
    shielded = (*inputs, {}) if inputs and isinstance(inputs[-1], dict) else inputs

    def run(axes: Mapping[str, Axes]) -> ir.Model:
        program = torch.onnx.export(
            module,
            shielded,
            input_names=list(tensors),
            output_names=output_names,
            opset_version=opset,
            dynamo=True,
            dynamic_shapes=_dynamic_shapes(inputs, tensors, axes) if axes else None,
            external_data=False,
            optimize=True,
            verbose=False,
        )
        if program is None:
            raise DoconvError("the exporter returned no model; update torch")
        own_outputs(program.model)
        if output_names is None and program.exported_program is not None:
            name_by_key(program.model, program.exported_program.call_spec.out_spec)
        return program.model

    try:
        return run({name: batch_axes.get(name, {}) | asked.get(name, {}) for name in tensors})
    except Exception as error:
        if not batch_axes:
            raise _cannot_export(module, inputs, error) from error
        failed = f"{type(error).__name__}: {error}"
    logger.info("the export with a dynamic batch failed (%s): once more with a static one", failed)
    # whether the dynamic batch was to blame, a static export shows better than any reading of messages
    try:
        return run(asked)
    except Exception as error:
        raise _cannot_export(module, inputs, error) from error


def _torchscript(
    module: nn.Module,
    inputs: tuple[Any, ...],
    tensors: Mapping[str, Tensor],
    asked: Mapping[str, Axes],
    opset: int,
    output_names: Sequence[str] | None,
) -> ir.Model:
    file = io.BytesIO()
    try:
        torch.onnx.export(
            module,
            inputs,
            file,  # type: ignore[arg-type]  # TorchScript's exporter takes any writable file
            input_names=list(tensors),
            output_names=output_names,
            opset_version=opset,
            dynamo=False,
            dynamic_axes=asked,
            verbose=False,
        )
    except Exception as error:
        raise _cannot_export(module, inputs, error) from error
    return ir.from_proto(onnx.load_from_string(file.getvalue()))


def _named_tensors(module: nn.Module, inputs: tuple[Any, ...], names: Sequence[str] | None) -> dict[str, Tensor]:
    """The tensors among the inputs, in the exporters' order, by the names their ONNX inputs get."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if names is None:
        arguments = forward_names(module, len(inputs))
        names = []
        for argument, value in zip(arguments, inputs, strict=True):
            count = sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
            names += [argument] if count == 1 else [f"{argument}_{index}" for index in range(count)]
    if len(names) != len(tensors) or len(set(names)) != len(names):
        raise UsageError(f"expected {len(tensors)} different input names, one per tensor, got {list(names)}")
    return dict(zip(names, tensors, strict=True))


def _asked_axes(tensors: Mapping[str, Tensor], dynamic: Mapping[str, Mapping[int, str]] | None) -> dict[str, Axes]:
    for name, axes in (dynamic or {}).items():
        if name not in tensors:
            raise UsageError(f"dynamic names no input '{name}': expected one of {list(tensors)}")
        rank = tensors[name].dim()
        for axis in axes:
            if not 0 <= axis < rank:
                raise UsageError(f"input '{name}' has no axis {axis} for dynamic: expected 0 to {rank - 1}")
    return {name: dict(axes) for name, axes in (dynamic or {}).items()}


def _batch_axes(tensors: Mapping[str, Tensor]) -> dict[str, Axes]:
    first = next(iter(tensors.values()), None)
    if first is None or first.dim() == 0:
        return {}
    batch = first.shape[0]
    if batch < 2:
        raise UsageError(
            f"a dynamic batch needs example inputs of batch 2 or more (1 may be baked in), got "
            f"{tuple(first.shape)}: repeat the sample, or pass dynamic_batch=False"
        )
    return {name: {0: BATCH} for name, tensor in tensors.items() if tensor.dim() and tensor.shape[0] == batch}


def _dynamic_shapes(
    inputs: tuple[Any, ...], tensors: Mapping[str, Tensor], axes: Mapping[str, Axes]
) -> tuple[Any, ...]:
    """torch.export's form: the inputs' own structure with {axis: name}, or None, in each tensor's place."""
    names = iter(tensors)
    leaves, structure = pytree.tree_flatten(inputs)
    shapes = [axes.get(next(names)) or None if isinstance(leaf, Tensor) else None for leaf in leaves]
    tree: tuple[Any, ...] = pytree.tree_unflatten(shapes, structure)
    return tree


def _require(model: ir.Model, opset: int | None, asked: Mapping[str, Axes]) -> None:
    got = model.opset_imports.get("")
    if opset is not None and got != opset:
        raise DoconvError(f"the exporter cannot write opset {opset}, got {got}: pass `opset` {got}")
    inputs = {value.name: value.shape for value in model.graph.inputs}
    for name, axes in asked.items():
        shape = inputs.get(name)
        for axis in axes:
            if shape is not None and isinstance(shape[axis], int):
                raise DoconvError(
                    f"axis {axis} of input '{name}' was to be dynamic, got {shape[axis]}: the model computes "
                    "with this size; leave it out of dynamic"
                )


def _is_or_holds_a_detector(module: nn.Module) -> bool:
    from torchvision.models import detection  # type: ignore[import-untyped]

    detectors = (detection.generalized_rcnn.GeneralizedRCNN, detection.RetinaNet, detection.FCOS, detection.ssd.SSD)
    return any(isinstance(part, detectors) for part in module.modules())


def _cannot_export(module: nn.Module, inputs: tuple[Any, ...], error: BaseException) -> DoconvError:
    plain = plain_outputs(module, inputs)
    if plain:
        return DoconvError(
            f"'{type(module).__name__}' cannot be exported to ONNX: {listed(plain)} among its outputs; ONNX has "
            "tensors only: return those alone"
        )
    while error.__cause__ is not None:
        error = error.__cause__
    reason = textwrap.shorten(f"{type(error).__name__}: {error}", 400)
    return DoconvError(
        f"'{type(module).__name__}' cannot be exported to ONNX: {reason}; change that part of its "
        "forward, or ask for another opset or fewer dynamic axes"
    )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module has its own mode again."""
    modes = [(part, part.training) for part in module.modules()]
    set_eval_mode(module)
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporters' warnings, logs and prints: their exceptions say what matters."""
    names = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
