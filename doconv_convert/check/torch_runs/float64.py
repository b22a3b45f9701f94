"""The yardstick: the same model run in float64."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from doconv_convert.check.torch_runs.device import full_precision
from doconv_convert.errors import DoconvError, UsageError
from doconv_convert.rewrite.observe import run_model
from doconv_convert.rewrite.tracing import float64_by_default, set_eval_mode, undisturbed


def run_float64(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The outputs' tensors, in order, of `model` in eval mode in float64, also where its own code asks for
    float32 (RAFT's coordinate grids do). Afterwards the model has its own dtypes and values again.

    Raises DoconvError where the model does not run in float64."""
    with widened(model):
        return output_tensors(float64_runs(model, inputs).outputs[0])


@dataclass(frozen=True)
class Runs:
    """The outputs, run after run; the random generators that were drawn from; and numbers on the modules that the last
    run left otherwise than the first: what counts its calls."""

    outputs: list[Any]
    drawn: tuple[str, ...]
    counting: tuple[str, ...]


def float64_runs(model: nn.Module, inputs: Any, runs: int = 1, *, gradients: bool = False) -> Runs:
    """What a `widened` model gives in eval mode on the widened inputs; attributes, buffers and torch's and Python's
    random states are as before then. With `gradients` the outputs have them. Raises DoconvError where the model does
    not run in float64."""
    buffers = [(buffer, buffer.data.clone()) for buffer in model.buffers()]  # a forward may write into these
    try:
        with (
            full_precision(),
            torch.set_grad_enabled(gradients),
            undisturbed(model),
            float64_by_default(),
            _WidenFloats(),
        ):
            set_eval_mode(model)
            before = _random_states()
            outputs = [tree_map(_own, run_model(model, tree_map(widen, inputs)))]
            drawn = tuple(name for name, state in _random_states().items() if state != before[name])
            numbers = _numbers(model)
            outputs += [tree_map(_own, run_model(model, tree_map(widen, inputs))) for _ in range(runs - 1)]
            counting = tuple(name for name, value in _numbers(model).items() if value != numbers.get(name, value))
            return Runs(outputs, drawn, counting)
    except Exception as error:  # the user's forward
        raise DoconvError(
            f"{type(model).__name__} does not run in float64, which its outputs are judged by ({type(error).__name__}: "
            f"{error}); skip the proof with `verify=False`, or keep its constants in buffers."
        ) from error
    finally:
        for buffer, value in buffers:
            buffer.data = value


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """The model itself in float64: a copy of a large one would take three times its weights."""
    parameters = [(p, p.dtype) for p in model.parameters() if p.is_floating_point()]
    buffers = [(b, b.data) for b in model.buffers()]
    for parameter, _ in parameters:
        parameter.data = parameter.data.double()
    for buffer, value in buffers:
        buffer.data = widen(value)
    try:
        yield
    finally:
        for parameter, dtype in parameters:
            parameter.data = parameter.data.to(dtype)
        for buffer, value in buffers:
            buffer.data = value


def run_inputs(model: nn.Module, inputs: Any) -> Any:
    """The model's output. Raises UsageError, naming the inputs' shapes, where it does not run on them."""
    try:
        return run_model(model, inputs)
    except Exception as error:  # the user's forward
        shapes = ", ".join(str(tuple(t.shape)) for t in output_tensors(inputs))
        raise UsageError(
            f"{type(model).__name__} does not run on inputs of shape {shapes} ({type(error).__name__}: {error}); give "
            "the right ones with `input_shapes` or `input_file`."
        ) from error


def output_tensors(output: Any) -> list[Tensor]:
    """The tensors of an output in any nesting of dicts, lists and tuples, in the exporter's order."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _own(value: Any) -> Any:
    """A buffer that the model returns has its old values again after the run."""
    return value.clone() if isinstance(value, Tensor) else value


def widen(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _numbers(model: nn.Module) -> dict[str, Any]:
    """The plain numbers among the modules' own attributes."""
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float)
    }


def _random_states() -> dict[str, str]:
    states: dict[str, Any] = {"Python": random.getstate(), "numpy": np.random.get_state()}
    states["torch"] = torch.random.get_rng_state().numpy().tobytes()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["CUDA"] = torch.cuda.get_rng_state().numpy().tobytes()
    return {name: repr(state) for name, state in states.items()}


class _WidenFloats(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            func = torch.Tensor.double
        narrow = (torch.float32, torch.float16, torch.bfloat16)
        args, kwargs = tree_map(
            lambda leaf: torch.float64 if isinstance(leaf, torch.dtype) and leaf in narrow else leaf,
            (args, kwargs or {}),
        )
        return func(*args, **kwargs)
