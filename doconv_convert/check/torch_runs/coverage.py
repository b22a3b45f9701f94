"""Coverage: which kernels the compared outputs would have betrayed.

A kernel was tested only if an elementwise relative change of 1e-3 would move some output beyond its bound.
To first order such a change dk = 1e-3 * k * n, n ~ N(0, 1), moves an output y by J dk; for a random direction
r ~ N(0, 1) the expectation of ||grad_k <r, y> * k||^2 is that of ||J (k * n)||^2. Each output's r is divided by
its bound, so one backward pass answers for all outputs and all kernels. Where a gradient is cut on the way
(torchvision detaches its proposals), the kernel is changed and the outputs are watched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from doconv_convert.check.outputs.compare import COVERED_ABOVE

RELATIVE_CHANGE = 1e-3
TRIES = 3
DECIDES, UNUSED = "it only decides what is shown", "no output depends on it"


Reach = Mapping[str, float | None]
"""Per kernel how far a change of 1e-3 would move the outputs, in units of their bounds: above COVERED_ABOVE it is seen.
None: no gradient reaches it; in a proof, it is not even read in eval mode (it only runs in training)."""


def measure_sensitivity(
    outputs: Sequence[Tensor], absolute_bounds: Sequence[float], kernels: Mapping[str, Tensor]
) -> Reach:
    """The sensitivity of `kernels` (leaf tensors with gradients) by float `outputs` computed from them.

    `absolute_bounds` is, per output, the L2 distance that its comparison allows.
    """
    generator = torch.Generator().manual_seed(0)
    directed = []
    for output, bound in zip(outputs, absolute_bounds, strict=True):
        if output.requires_grad and bound > 0:
            direction = torch.randn(output.shape, generator=generator, dtype=output.dtype)
            directed.append((output * direction.to(output.device)).sum() / bound)
    if not directed:
        return dict.fromkeys(kernels)
    # Divided by the number of outputs' root: only then does the sum above 1 mean that one of them is.
    total = torch.stack(directed).sum() / math.sqrt(len(directed))
    gradients = torch.autograd.grad(total, list(kernels.values()), allow_unused=True)
    return {
        name: None if gradient is None else RELATIVE_CHANGE * float((gradient * kernel.detach()).norm())
        for (name, kernel), gradient in zip(kernels.items(), gradients, strict=True)
    }


def perturbation(
    run: Callable[[], Sequence[Tensor]],
    outputs: Sequence[Tensor],
    absolute_bounds: Sequence[float],
    kernel: Tensor,
    seed: int = 0,
    change: float = RELATIVE_CHANGE,
) -> float | None:
    """How far a random relative `change` really moves what `run` returns away from `outputs`, in units of the bounds.

    `kernel` is changed in place for the run and restored. None where nothing moves.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(kernel.shape, generator=generator, dtype=kernel.dtype).to(kernel.device)
    before = kernel.detach().clone()
    with torch.no_grad():
        kernel.mul_(1 + change * noise)
        try:
            moved = run()
        finally:
            kernel.copy_(before)
        if any(one.shape != other.shape for one, other in zip(moved, outputs, strict=True)):
            return math.inf  # other detections
        distances = [
            float((one - other).norm()) / bound
            for one, other, bound in zip(moved, outputs, absolute_bounds, strict=True)
            if bound > 0
        ]
    return max(distances, default=0.0) or None


def least_perturbation(change: Callable[[int], float | None]) -> float | None:
    """The least of TRIES changes: behind a cut gradient stand decisions (which proposals are kept), which one change
    turns over and the next does not."""
    least = math.inf
    for seed in range(TRIES):
        moved = change(seed)
        if moved is None:
            return None
        least = min(least, moved)
    return least


def why_uncovered(change: Callable[[int], float | None]) -> str | None:
    """What changes of a kernel's own size tell of one whose gradient is cut or zero: DECIDES where one of them shows,
    UNUSED where none moves anything, None where they move the outputs too little."""
    moved = [change(seed) for seed in range(TRIES)]
    if all(one is None for one in moved):
        return UNUSED
    return DECIDES if any(one is not None and one > COVERED_ABOVE for one in moved) else None


def kernels_read(run: Callable[[], object], kernels: Mapping[str, Tensor]) -> set[str]:
    """The names of those kernels whose values any torch function takes while `run` runs."""
    reads = ReadsOf(kernels)
    with reads, torch.no_grad():
        run()
    return reads.names


class ReadsOf(TorchFunctionMode):
    """Notes the `names` of those tensors whose values a torch function takes inside its scope."""

    # Of these, all but the first argument say in what form a result is wanted.
    _FORMS = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})
    _VALUES = frozenset(
        {"item", "tolist", "numpy", "__array__", "__float__", "__int__", "__bool__", "equal", "allclose"}
    )
    _NEW = ("new_", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._names: dict[int, str] = {id(tensor): name for name, tensor in tensors.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        gives_values = name in self._VALUES or any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))
        if gives_values and not name.startswith(self._NEW):  # others give a shape, a dtype, a device
            read = args[:1] if name in self._FORMS else tree_leaves((args, kwargs))
            self.names.update(self._names[id(value)] for value in read if id(value) in self._names)
        return result
