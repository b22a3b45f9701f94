"""DO-Conv layers of other people's code, told from a state dict's keys and shapes alone.

A unit is {W, D, d_diag or D_diag} under one prefix, grouped by the last part of each key, with shapes that go
together: W (C_out, C_in/g, D_mul), D and the identity (C_in, K, D_mul). Layers that were folded already (W with
four dimensions) and 1x1 layers (W alone, one slot) are read too. What only resembles them is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from doconv_convert.errors import DoconvError
from doconv_convert.words import listed

IDENTITIES = ("d_diag", "D_diag")
ASSUMED = (
    "the authors' formula is assumed for them: keys cannot tell a class that also passes its kernel through a gate, or "
    "sums D over all channels; with the class at hand, name it (`model` FILE.py:FACTORY) and its own code is read"
)


@dataclass(frozen=True)
class Unit:
    """One foreign layer: `w` as stored; `d` and `identity` (C_in, K, D_mul) unless it has no D; `bias` (C_out);
    `mul` (1,), by which one variant multiplies kernel and bias. `keys` are all that belong to it, `ignored` those
    among them that are not used."""

    name: str
    w: Tensor
    d: Tensor | None = None
    identity: Tensor | None = None
    bias: Tensor | None = None
    mul: Tensor | None = None
    keys: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def positions(self) -> int:
        """K."""
        return int(self.w.shape[2:].numel() if self.d is None else self.d.shape[1])

    @property
    def groups(self) -> int | None:
        """g; None where no D tells C_in."""
        return None if self.d is None else self.d.shape[0] // self.w.shape[1]

    def key(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name


def find_units(state: Mapping[str, Tensor], path: str, own: Collection[str] = ()) -> tuple[Unit, ...]:
    """Every foreign unit in `state`; keys that the model has itself (`own`) are none.

    Raises DoconvError, naming the prefix and what is wrong, for units that lost a part or whose shapes do not go
    together, and for layers of other kinds (ShapeConv, a broken copy with `bias0`, TensorFlow's, MXNet's).
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        prefix, last = _split(key)
        if not any(_join(prefix, part) in own for part in ("W", "D", *IDENTITIES)):
            groups.setdefault(prefix, {})[last] = tensor
    _refuse_other_kinds(groups, path)
    units = [unit for prefix, found in groups.items() if (unit := _unit(prefix, found, state, path)) is not None]
    for prefix, found in groups.items():
        alone = "W" not in found and "D" in found and found["D"].dim() == 3 and _join(prefix, "weight") not in state
        if units and alone:
            raise _broken(path, prefix or "(root)", "has a 'D' but no 'W'; the file lost it")
    for unit in units:
        if unit.key("weight") in state:
            raise DoconvError(
                f"'{path}': '{unit.name}' has both a 'W' and a 'weight'; which is the kernel? Remove one."
            )
    return tuple(units)


def units_told(units: Sequence[Unit]) -> tuple[str, ...]:
    """What was taken for foreign layers, in plain sentences."""
    composed = [unit for unit in units if unit.d is not None]
    others = [unit for unit in units if unit.d is None]
    ignored = [key for unit in units for key in unit.ignored]
    told = []
    if composed:
        told.append(f"{len(composed)} foreign DO-Conv layers were told by their keys; {ASSUMED}")
    if others:
        names = listed([unit.name for unit in others])
        told.append(f"{len(others)} more have no D, being 1x1 or folded already: {names}")
    if ignored:
        told.append(f"left {len(ignored)} keys aside that their own 'W' and 'D' may have outgrown: {listed(ignored)}")
    return tuple(told)


def names_when_folded(keys: Collection[str]) -> set[str]:
    """The keys, and for every `W` the `weight` that it becomes: what a model's own keys are compared with."""
    return {*keys, *(_join(prefix, "weight") for prefix, last in map(_split, keys) if last == "W")}


def _split(key: str) -> tuple[str, str]:
    prefix, _, last = key.rpartition(".")
    return prefix, last


def _join(prefix: str, last: str) -> str:
    return f"{prefix}.{last}" if prefix else last


def _unit(prefix: str, found: Mapping[str, Tensor], state: Mapping[str, Tensor], path: str) -> Unit | None:
    name, w, d = prefix or "(root)", found.get("W"), found.get("D")
    diagonals = [one for one in IDENTITIES if one in found]
    if w is None:
        if diagonals:
            there = " and ".join(f"'{one}'" for one in ["D", *diagonals] if one in found)
            raise _broken(path, name, f"has {there} but no 'W'; the file lost it")
        return None
    if w.dim() < 3 and (d is None or d.dim() < 3) and not diagonals:
        return None  # some other layer's W
    if "bias0" in found:
        raise DoconvError(
            f"'{path}': '{name}' has a 'bias0', from a copy of the DO-Conv class that is broken when bias=True: it "
            "never adds its bias as trained; fix the class, save the file again under 'bias'."
        )
    bias, mul = found.get("bias"), found.get("mul")
    ignored = tuple(key for key in state if key.startswith(_join(prefix, "eval_conv."))) if mul is not None else ()
    used = [one for one in ("W", "D", *diagonals, "bias", "mul") if one in found]
    keys = (*(_join(prefix, one) for one in used), *ignored)
    _require_floats(path, name, {one: found[one] for one in used})
    if bias is not None and tuple(bias.shape) != (w.shape[0],):
        raise _broken(path, name, f"has a 'bias' of shape {tuple(bias.shape)}, expected {(w.shape[0],)}")
    if mul is not None and mul.numel() != 1:
        raise _broken(path, name, f"has a 'mul' of shape {tuple(mul.shape)}, expected (1,)")
    if d is None and not diagonals:
        if w.dim() == 3 and w.shape[2] != 1:
            raise _broken(
                path, name, f"has a 'W' of shape {tuple(w.shape)} but no 'D' and no identity; the file lost them"
            )
        kernel = w if w.dim() > 3 else w.reshape(*w.shape[:2], 1, 1)
        return Unit(prefix, kernel, bias=bias, mul=mul, keys=keys, ignored=ignored)
    if d is None or not diagonals:
        there, lost = ("D", "d_diag' or 'D_diag") if d is not None else (diagonals[0], "D")
        raise _broken(path, name, f"has 'W' and '{there}' but no '{lost}'; the file lost it")
    if len(diagonals) > 1:
        raise _broken(path, name, "has both 'd_diag' and 'D_diag'; it is twice the same layer: remove one")
    identity = found[diagonals[0]]
    _require_shapes(path, name, w, d, identity)
    return Unit(prefix, w, d, identity, bias, mul, keys, ignored)


def _require_shapes(path: str, name: str, w: Tensor, d: Tensor, identity: Tensor) -> None:
    got = f"got W {tuple(w.shape)}, D {tuple(d.shape)}, identity {tuple(identity.shape)}"
    expected = "expected (C_out, C_in/g, D_mul), (C_in, K, D_mul) and D's own shape"
    fits = w.dim() == 3 and d.dim() == 3 and d.shape == identity.shape and w.shape[2] == d.shape[2]
    empty = not (w.numel() and d.numel())
    if not fits or empty or d.shape[0] % w.shape[1] or w.shape[0] % (d.shape[0] // w.shape[1]):
        raise _broken(path, name, f"has shapes that do not go together: {got}; {expected}")


def _require_floats(path: str, name: str, found: Mapping[str, Tensor]) -> None:
    for key, tensor in found.items():
        if not tensor.is_floating_point():
            raise _broken(path, name, f"has a '{key}' of dtype {tensor.dtype}, expected floating point")


def _broken(path: str, name: str, what: str) -> DoconvError:
    return DoconvError(f"'{path}': the DO-Conv layer '{name}' {what}; save it again, or go back to an earlier one.")


def _refuse_other_kinds(groups: Mapping[str, Mapping[str, Tensor]], path: str) -> None:
    for prefix, found in groups.items():
        name = prefix or "(root)"
        if {"Base", "Shape"} <= found.keys():
            raise DoconvError(
                f"'{path}': '{name}' is a ShapeConv layer (keys {listed(sorted(found))}), not DO-Conv; fold it with "
                "its own project's code."
            )
    kind = _other_framework(groups)
    if kind is not None:
        raise DoconvError(
            f"'{path}': '{kind[1]}' has the layout of the authors' {kind[0]} layer, which is out of scope; convert the "
            "tensors to the layout of their PyTorch layer first: W (C_out, C_in/g, D_mul), D (C_in, K, D_mul)."
        )


def _other_framework(groups: Mapping[str, Mapping[str, Tensor]]) -> tuple[str, str] | None:
    """(framework, layer) where a D is (K, D_mul, C_in), as in TensorFlow and MXNet."""
    flat = {_join(prefix, last): tensor for prefix, found in groups.items() for last, tensor in found.items()}
    for key, d in flat.items():
        stem = key.removesuffix(":0")
        owner, separator = stem[:-1], stem[-2:-1]
        if not stem.endswith("D") or separator not in ("", ".", "/", "_") or d.dim() != 3 or owner + "d_diag" in flat:
            continue
        for kernel in ("kernel", "W"):
            w = flat.get(owner + kernel, flat.get(f"{owner}{kernel}:0"))
            theirs = w is not None and w.dim() == 3 and w.shape[0] == d.shape[1] and w.shape[1] > 0
            if w is not None and theirs and d.shape[2] % w.shape[1] == 0 and owner + "D_diag" not in flat:
                return "TensorFlow", owner.rstrip("./_") or key
        weight = flat.get(owner + "weight")
        if weight is not None and weight.dim() == 4:
            positions = weight.shape[2:].numel()
            square = d.shape[0] == d.shape[1] == positions
            if square and weight.shape[1] and d.shape[2] % weight.shape[1] == 0 and not _is_ours(d, weight):
                return "MXNet", owner.rstrip("./_") or key
    return None


def _is_ours(d: Tensor, weight: Tensor) -> bool:
    """Whether a D beside a kernel has this package's own layout (C_in, K, D_mul)."""
    positions = weight.shape[2:].numel()
    return d.shape[0] % weight.shape[1] == 0 and d.shape[1] == positions and d.shape[2] >= positions
