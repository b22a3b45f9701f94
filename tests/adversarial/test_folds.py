"""Nets of which a fold may change what they compute, each through the real `fold --onnx`: the file agrees with the
user's own trained model, or it is not proven and the reason is named."""

import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from adversarial.harness import SAME, Seen, far, fold_net, fresh_inputs, references, run_file, trained
from onnx import numpy_helper

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

# What a refusal has to name: what is done with the kernel, or that the fold changes the outputs.
KERNEL = r"kernel|fold(ed)? model|weight|written by its own forward"
EXPORT = rf"export|{KERNEL}"
RANDOM = r"itself|repeat|random|run to run|two runs"
UNSAVED = r"checkpoint|state dict|saved|seed|built"
UNSHOWN = r"same for every|constant|shows nothing|does not depend|--input|`input_file`"
# No reason for a net whose outputs do depend on its inputs.
MISLEADING = r"same for every sample|please report|Traceback"

# Nets that the contract promises to fold: they must come out proven.
CONTROL = "unrepeatable.Control"
RIGHT = [
    CONTROL,
    "reading.TiedAutoencoder",
    "reading.UntraceableAutoencoder",
    "reading.NormPenalty",
    "reading.TransposedKernel",
    "reading.StatisticsGate",
    "reading.Hypernet",
    "reading.OtherModule",
    "reading.Holder",
    "computing.standardized",
    "computing.normalized",
    "computing.Shared",
    "computing.SharedByLinear",
    "computing.SharedByTransposedLayer",
    "patched.forward_hook",
    "patched.forward_pre_hook",
    "patched.FixedFeatures",
    "patched.LoadHook",
    "unrepeatable.ByTraining",
    "hidden.Gated",
    "hidden.half",
    "hidden.bfloat16",
    "hidden.float64",
    "objects.Registered",
]

# The others: right, or refused for a reason of this form.
CASES = {
    "reading.DataAutoencoder": EXPORT,
    "reading.ByName": KERNEL,
    "reading.ByStateDict": EXPORT,
    "reading.ByParameterDict": KERNEL,
    "reading.AllParameters": KERNEL,
    "reading.ParameterCount": KERNEL,
    "reading.ByType": KERNEL,
    "reading.UsesD": KERNEL,
    "reading.Alias": KERNEL,
    "reading.DataAlias": rf"off by|{KERNEL}",
    "reading.NumpyAlias": rf"off by|{KERNEL}",
    "writing.masked": EXPORT,
    "writing.data_masked": EXPORT,
    "writing.max_norm": EXPORT,
    "writing.index_write": EXPORT,
    "writing.ParentAssigns": EXPORT,
    "writing.ParentNormalizes": EXPORT,
    "writing.ParentClips": EXPORT,
    "writing.WritesStateDict": EXPORT,
    "writing.WritesAlias": EXPORT,
    "writing.writing_hook": EXPORT,
    "writing.PrunesInEval": KERNEL,
    "computing.rounded": EXPORT,
    "computing.binary": KERNEL,
    "computing.top_half": KERNEL,
    "computing.cached_in_eval": EXPORT,
    "computing.cached_in_buffer": EXPORT,
    "computing.averaged_in_buffer": EXPORT,
    "computing.cached_globally": EXPORT,
    "computing.SharedByGroups": KERNEL,
    "computing.SharedByParent": KERNEL,
    "patched.closure": rf"closure|{EXPORT}",
    "patched.layer_closure": rf"closure|{EXPORT}",
    "patched.layer_method": KERNEL,
    "patched.weight_from_neighbor": rf"hook|{KERNEL}",
    "patched.Unregistered": UNSAVED,
    "patched.RandomFeatures": UNSAVED,
    "patched.UnsavedBuffer": UNSAVED,
    "patched.ExtraState": r"extra|state",
    "unrepeatable.Dropout": RANDOM,
    "unrepeatable.Noise": RANDOM,
    "unrepeatable.RareNoise": RANDOM,
    "unrepeatable.PythonNoise": RANDOM,
    "unrepeatable.OwnGenerator": RANDOM,
    "unrepeatable.CallCount": RANDOM,
    "unrepeatable.CallCountBuffer": rf"{RANDOM}|export",
    "unrepeatable.Warmup": RANDOM,
    "unrepeatable.ByPrecision": r"float32|float64|off by",
    "unrepeatable.ReadsInFloat32": rf"float32|{KERNEL}",
    "unrepeatable.ByGradMode": r"grad|off by",
    "unrepeatable.ByExport": r"export|off by",
    "unrepeatable.RebuiltInEval": EXPORT,
    "hidden.ClosedRelu": EXPORT,
    "hidden.Scores": EXPORT,
    "hidden.Steps": EXPORT,
    "hidden.Offset": rf"{EXPORT}|shows nothing",
    "hidden.SmallBesideLarge": EXPORT,
    "hidden.ClosedRead": KERNEL,
    "hidden.BatchOfOne": "batch",
    "hidden.SqueezedBatch": "batch",
    "hidden.Branch": r"branch|cond|cover|export",
    "hidden.Constant": UNSHOWN,
    "hidden.ConstantBeside": UNSHOWN,
    "hidden.NotANumber": r"finite|NaN",
    "hidden.NotANumberBeside": r"finite|NaN",
    "hidden.InPlace": r"in place|input",
    "objects.CacheBeside": "Cache",
    "objects.DataClass": "Result",
    "objects.Object": "Cache",
    "objects.ObjectList": "Cache",
}
# Some of each end; the others are left to the long tests, as two exports cost seconds.
DEFAULT = [
    "reading.ByName",
    "writing.ParentClips",
    "computing.SharedByGroups",
    "patched.closure",
    "patched.Unregistered",
    "unrepeatable.Dropout",
    "unrepeatable.CallCount",
    "hidden.ClosedRead",
    "hidden.BatchOfOne",
]
ROADS = [(recipe, with_inputs) for recipe in (False, True) for with_inputs in (False, True)]
ROAD_NAMES = ["state_dict", "state_dict-inputs", "recipe", "recipe-inputs"]


def road_of(net: str) -> tuple[bool, bool]:
    """One of the four, the same in every run; the long tests have all."""
    return ROADS[zlib.crc32(net.encode()) % len(ROADS)]


def require_honest(net: str, seen: Seen) -> None:
    assert seen.crash is None, seen.words
    assert not seen.wrong_yes, f"{net}: proven, and off by {seen.off:.1e}"
    assert seen.proven or net not in RIGHT, seen.reason
    if seen.proven:
        assert seen.code == 0
        return
    assert seen.code in (1, 3)
    assert seen.off is None, "a file that is not proven was written"
    assert re.search(CASES[net], seen.reason, re.IGNORECASE), seen.reason
    assert CASES[net] == UNSHOWN or not re.search(MISLEADING, seen.reason), seen.reason


@pytest.mark.parametrize("net", DEFAULT)
def test_a_file_is_right_or_is_not_proven(net: str, tmp_path: Path) -> None:
    recipe, with_inputs = road_of(net)
    require_honest(net, fold_net(net, tmp_path, recipe=recipe, with_inputs=with_inputs))


@pytest.mark.zoo
@pytest.mark.parametrize(("recipe", "with_inputs"), ROADS, ids=ROAD_NAMES)
@pytest.mark.parametrize("net", [*RIGHT, *CASES])
def test_every_road_ends_in_a_right_file_or_none(net: str, recipe: bool, with_inputs: bool, tmp_path: Path) -> None:
    require_honest(net, fold_net(net, tmp_path, recipe=recipe, with_inputs=with_inputs))


def test_the_harness_sees_a_kernel_that_is_slightly_off(tmp_path: Path) -> None:
    """A right file, one kernel of it scaled by 1.0001; and a proof that would be wrong counts as one."""
    seen = fold_net(CONTROL, tmp_path, recipe=False, with_inputs=False)
    assert seen.proven
    model = onnx.load(tmp_path / "out.onnx")
    kernel = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    kernel.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(kernel) * np.float32(1.0001), kernel.name))
    onnx.save(model, tmp_path / "off.onnx")
    expected = references(trained(CONTROL))
    assert expected is not None
    for file, same in (("out", True), ("off", False)):
        off = far(run_file(tmp_path / f"{file}.onnx", fresh_inputs(torch.float32)), expected)
        assert (off <= SAME) is same
        assert replace(seen, off=off).wrong_yes is not same
