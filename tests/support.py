"""What tests of several folders share: models by source, random weights, and measures of difference."""

import copy
import functools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

import sample_models
from doconv_convert.artifacts.sources.source import build, parse_source
from doconv_convert.check.outputs.session import OnnxSession

SAMPLES = ("residual", "grouped", "functional", "tied", "control_flow", "digits")
# The share of the output's scale by which a randomized net tells two images apart.
LEAST_SPREAD = 1e-2


def inexact_session(error: float, where: Callable[[OnnxSession], bool] = lambda s: not s.wide) -> type[OnnxSession]:
    """An onnxruntime that is off by `error`, relative, in those sessions."""

    class Inexact(OnnxSession):
        def run(self, inputs: Any) -> Any:
            return [value * np.float32(1 + error * where(self)) for value in super().run(inputs)]

    return Inexact


def wrong_where(optimized: bool) -> type[onnxruntime.InferenceSession]:
    """onnxruntime's own session, off by 1e-3 in those sessions that it optimizes, or in the others."""

    class Wrong(onnxruntime.InferenceSession):
        def run(self, *arguments: Any, **options: Any) -> Any:
            level = self.get_session_options().graph_optimization_level
            wrong = (level != onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL) is optimized
            return [value * np.float32(1 + 1e-3 * wrong) for value in super().run(*arguments, **options)]

    return Wrong


def sample_source(name: str) -> str:
    return f"{Path(sample_models.__file__).parent / name}.py:{name}"


@functools.cache
def _built(source: str) -> nn.Module:
    return build(parse_source(source))


def build_model(source: str) -> nn.Module:
    """A fresh copy of a source's model, in eval mode; a bare name is a sample model."""
    return copy.deepcopy(_built(source if ":" in source else sample_source(source))).eval()


def varied_images(*shape: int, seed: int = 0) -> Tensor:
    """Images (N, C, *size) that differ in brightness, contrast and orientation, not only in their noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    ramp = torch.linspace(-1, 1, shape[-1]).expand(shape)
    each = (shape[0], *[1] * (len(shape) - 1))
    slope, offset, contrast = (torch.randn(each, generator=generator) for _ in range(3))
    return noise * (0.5 + contrast.abs()) + 2 * slope * ramp + offset


def is_factor(name: str) -> bool:
    """Whether a parameter's name is that of a D or a weight_extra."""
    return is_d(name) or name.rpartition(".")[2].endswith(("weight_extra", "_extra"))


def is_d(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last == "D" or last.endswith("_D")


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """D ~ N(0, 1/K) and weight_extra moved, as after a long training; asserts that there was a D."""
    generator = torch.Generator().manual_seed(seed)
    moved = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if is_d(name):
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
                moved += 1
            elif is_factor(name):
                parameter.add_((noise * 0.1).to(parameter.dtype))
    assert moved, "the model has no D"
    return model


def randomize_and_calibrate(model: nn.Module, inputs: Tensor, seed: int) -> nn.Module:
    """Weights under which the output depends on the image and on every kernel; in eval mode.

    Randomizes D where there is one, BN affine parameters, layer scales, biases and zero weights, calibrates the
    batch-norm statistics on `inputs`, moves them by 5 %, and asserts that outputs differ between samples.
    """
    if any(is_d(name) for name, _ in model.named_parameters()):
        randomize(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if is_factor(name):
                continue
            if max(parameter.shape, default=1) == parameter.numel():  # one number a channel
                parameter.copy_(0.2 * noise if name.endswith("bias") else 1 + 0.2 * noise)
            elif not parameter.any():
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        model.eval()
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train().reset_running_stats()
            norm.momentum = 1.0
        model(inputs)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval().momentum = momentum
            for statistic in (norm.running_mean, norm.running_var):
                assert statistic is not None
                jitter = torch.randn(statistic.shape, generator=generator, dtype=torch.float64).to(statistic.dtype)
                statistic.mul_(1 + 0.05 * jitter.clamp(-2, 2))
        for output in outputs(model(inputs)):
            assert difference(output[:1].expand_as(output), output) > LEAST_SPREAD, "the output ignores the image"
    return model


def outputs(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def difference(a: Any, b: Any) -> float:
    """The largest |a - b| / |b| over the tensors of two results, by L2 norm, in float64; infinite where shapes or
    finiteness differ."""
    pairs = list(zip(outputs(a), outputs(b), strict=True))
    assert pairs, "nothing to compare"
    worst = 0.0
    for x, y in pairs:
        x, y = x.detach().double(), y.detach().double()
        if x.shape != y.shape or not (x.isfinite().all() and y.isfinite().all()):
            return float("inf")
        worst = max(worst, float((x - y).norm()) / max(float(y.norm()), 1e-300))
    return worst


def equal(a: Any, b: Any) -> bool:
    """Whether all tensors of two results are equal, bit for bit (`torch.equal`)."""
    pairs = list(zip(outputs(a), outputs(b), strict=True))
    assert pairs, "nothing to compare"
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def run(model: nn.Module, *inputs: Tensor, seed: int = 0) -> Any:
    """One forward without gradients, dropout drawn from `seed`; the global random state stays."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model(*inputs)


def signature(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """What a fold must bring back: the state dict's keys, order, shapes and dtypes, and every module's class."""
    state = [(key, tuple(t.shape), t.dtype) for key, t in model.state_dict().items()]
    classes = [(path, type(module)) for path, module in model.named_modules(remove_duplicate=False)]
    return state, classes


@contextmanager
def random_state_untouched() -> Iterator[None]:
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    yield
    after = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def require_ended(process: int, seconds: float = 60) -> None:
    """Fails where that process, by its id, still runs after so long. Reads /proc."""
    stat = Path(f"/proc/{process}/stat")
    deadline = time.monotonic() + seconds
    # a dead process whose parent does not ask for it is a zombie, Z
    while stat.exists() and ") Z" not in stat.read_text():
        assert time.monotonic() < deadline, f"process {process} goes on without its parent"
        time.sleep(0.1)
