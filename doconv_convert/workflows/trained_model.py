"""A checkpoint in its network: loaded, ready to be folded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from doconv_convert.artifacts.checkpoints.bounded import build_within
from doconv_convert.artifacts.checkpoints.checkpoint import fitted, load_into
from doconv_convert.artifacts.checkpoints.reading import Checkpoint, read_checkpoint, require_finite
from doconv_convert.artifacts.checkpoints.unwrap import Selection
from doconv_convert.artifacts.models import notes_on
from doconv_convert.artifacts.sources.source import Source, build
from doconv_convert.artifacts.sources.unsaved import require_reproducible
from doconv_convert.errors import UsageError
from doconv_convert.rewrite.convert import copy_model
from doconv_convert.rewrite.fold import FoldReport, fold_in_place
from doconv_convert.rewrite.linear.steps import Merge
from doconv_convert.rewrite.options import Options
from doconv_convert.rewrite.tracing import set_eval_mode


@dataclass(frozen=True)
class TrainedCheckpoint:
    """A checkpoint in its network: the trained (unfolded) model in eval mode and where it came from."""

    checkpoint: Checkpoint
    source: Source
    trained: nn.Module
    options: Options
    constant_kernels: bool = False
    merge: Merge = "none"


def load_trained(
    path: Path,
    source: Source | None,
    options: Options,
    selection: Selection | None = None,
    constant_kernels: bool = False,
    merge: Merge = "none",
) -> TrainedCheckpoint:
    """Read a checkpoint of ours, or any state dict of `source`'s model, foreign DO-Conv layers included.
    Raises DoconvError."""
    checkpoint = read_checkpoint(path, selection)
    require_finite(checkpoint)
    if source is None:
        recipe = checkpoint.recipe
        source = recipe.trusted_source(str(path)) if recipe else _no_source(path)
        model = build_within(source, checkpoint.state, str(path))
    else:
        model = build(source)
    require_reproducible(source, model)
    checkpoint = fitted(checkpoint, model)
    trained = set_eval_mode(load_into(model, checkpoint, options))
    # the file's own tensors are the model's now; kept, they would be a second copy of the weights
    checkpoint = replace(checkpoint, state={}, notes=(*checkpoint.notes, *notes_on(source, model)))
    return TrainedCheckpoint(checkpoint, source, trained, options, constant_kernels, merge)


def load_again(loaded: TrainedCheckpoint) -> TrainedCheckpoint:
    """The same, read from its file once more."""
    path, selection = Path(loaded.checkpoint.path), loaded.checkpoint.selection
    return load_trained(path, loaded.source, loaded.options, selection, loaded.constant_kernels, loaded.merge)


def fold_trained(loaded: TrainedCheckpoint, *, inplace: bool = False, merge: Merge | None = None) -> FoldReport:
    """Fold a copy of the trained model, or it; `merge` in place of the checkpoint's own."""
    model = loaded.trained if inplace else copy_model(loaded.trained)
    merge = loaded.merge if merge is None else merge
    return fold_in_place(model, constant_kernels=loaded.constant_kernels, check_first=False, merge=merge)


def _no_source(path: Path) -> Source:
    raise UsageError(f"'{path}' has no recipe that says what model it holds; name it with `model` SOURCE.")
