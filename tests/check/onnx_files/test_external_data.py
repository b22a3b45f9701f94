"""External data is read from regular files of the model's own folder alone, whichever runtime is installed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support_cli import run_cli

from doconv_convert import DoconvError, count_macs
from doconv_convert.check.onnx_files.external_data import external_files, require_own_data
from doconv_convert.check.onnx_files.graph_diff import compare_graphs
from doconv_convert.check.outputs.session import OnnxSession

SIZE = 4 * 3 * 9 * 4  # bytes of the kernel
KERNEL = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)


def write(path: Path, *, where: str = "initializer", shape: tuple[int, ...] = (4, 3, 3, 3), **entries: str) -> Path:
    """A convolution whose kernel lies in another file: among the initializers, in a Constant, or in an If's branch."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key.rstrip("_"), value=value)
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    if where == "constant":
        nodes.insert(0, helper.make_node("Constant", [], ["w"], value=tensor))
    elif where == "branch":
        result = [helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3, 3, 3])]
        branch = helper.make_graph([], "branch", [], result, [tensor])
        nodes.insert(0, helper.make_node("If", ["yes"], ["w"], then_branch=branch, else_branch=branch))
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [tensor] if where == "initializer" else [numpy_helper.from_array(np.array(True), "yes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    path.write_bytes(model.SerializeToString())
    return path


def in_folder(folder: Path) -> Path:
    """A folder for the model, beside a file with a kernel that is not the model's."""
    KERNEL.tofile(folder / "outside.bin")
    inside = folder / "model"
    (inside / "sub").mkdir(parents=True)
    return inside


def linked(folder: Path, target: Path, name: str = "w.bin") -> None:
    (folder / name).symlink_to(target)


# (what is prepared in the model's folder, the entries of the tensor, a word of the refusal)
HOSTILE: dict[str, tuple[Callable[[Path], Any], dict[str, str], str]] = {
    "an absolute path": (lambda d: None, {"location": "{outside}"}, "points out of the model's folder"),
    "a path up": (lambda d: None, {"location": "../outside.bin"}, "points out of the model's folder"),
    "down and up": (lambda d: None, {"location": "sub/../../outside.bin"}, "points out of the model's folder"),
    "up, on Windows": (lambda d: None, {"location": "sub\\..\\..\\outside.bin"}, "points out of the model's folder"),
    "a drive": (lambda d: None, {"location": "C:outside.bin"}, "points out of the model's folder"),
    "another machine": (lambda d: None, {"location": "\\\\host\\share\\w.bin"}, "points out of the model's folder"),
    "a link out": (lambda d: linked(d, d.parent / "outside.bin"), {"location": "w.bin"}, "a link out"),
    "a linked folder": (lambda d: linked(d, d.parent, "out"), {"location": "out/outside.bin"}, "a link out"),
    "a link to a device": (lambda d: linked(d, Path("/dev/zero")), {"location": "w.bin"}, "a link out"),
    "a pipe": (lambda d: os.mkfifo(d / "w.bin"), {"location": "w.bin"}, "no regular file"),
    "a folder": (lambda d: None, {"location": "sub"}, "no regular file"),
    "the folder": (lambda d: None, {"location": "."}, "no regular file"),
    "nothing": (lambda d: None, {"location": ""}, "points out of the model's folder"),
    "no name": (lambda d: KERNEL.tofile(d / "w.bin"), {"offset": "0"}, "names 0 files"),
    "a zero byte": (lambda d: None, {"location": "w\0.bin"}, "cannot be read"),
    "a link to itself": (lambda d: linked(d, d / "w.bin"), {"location": "w.bin"}, "cannot be read"),
    "what is not there": (lambda d: None, {"location": "absent.bin"}, "cannot be read"),
    "an address": (lambda d: None, {"location": "*/_ORT_MEM_ADDR_/*", "offset": "4096"}, "an address in memory"),
    "a file for the address": (
        lambda d: ((d / "*/_ORT_MEM_ADDR_").mkdir(parents=True), KERNEL.tofile(d / "*/_ORT_MEM_ADDR_/*")),
        {"location": "*/_ORT_MEM_ADDR_/*"},
        "an address in memory",
    ),
    "beyond the end": (lambda d: KERNEL.tofile(d / "w.bin"), {"location": "w.bin", "offset": "4"}, "expected 436"),
    "far beyond": (lambda d: KERNEL.tofile(d / "w.bin"), {"location": "w.bin", "offset": "9" * 18}, "has 432 bytes"),
    "before the start": (lambda d: KERNEL.tofile(d / "w.bin"), {"location": "w.bin", "offset": "-4"}, "offset '-4'"),
    "no number": (lambda d: KERNEL.tofile(d / "w.bin"), {"location": "w.bin", "offset": "0x4"}, "offset '0x4'"),
    "too short a part": (lambda d: KERNEL.tofile(d / "w.bin"), {"location": "w.bin", "length": "4"}, "holds 4 bytes"),
    "an endless part": (lambda d: KERNEL.tofile(d / "w.bin"), {"location": "w.bin", "length": "9" * 25}, "length"),
    "an empty file": (lambda d: (d / "w.bin").touch(), {"location": "w.bin"}, "has 0 bytes"),
}


@pytest.mark.parametrize("where", ["initializer", "constant", "branch"])
@pytest.mark.parametrize("case", HOSTILE)
def test_other_data_is_refused_before_anything_opens_it(tmp_path: Path, case: str, where: str) -> None:
    folder = in_folder(tmp_path)
    prepare, entries, said = HOSTILE[case]
    prepare(folder)
    entries = {key: value.format(outside=tmp_path / "outside.bin") for key, value in entries.items()}
    path = write(folder / "m.onnx", where=where, **entries)
    if case == "no name":  # nothing in the file could be followed
        path.write_bytes(path.read_bytes() + onnx.ModelProto(doc_string="location").SerializeToString())
    with pytest.raises(DoconvError, match="tensor 'w'.*" + said.replace("*", r"\*")):
        require_own_data(path)
    with pytest.raises(DoconvError, match="tensor 'w'"):
        OnnxSession(path)
    with pytest.raises(DoconvError, match="tensor 'w'"):
        OnnxSession(path, wide={"ReduceMean"})
    with pytest.raises(DoconvError, match="tensor 'w'"):
        compare_graphs(path, path)
    assert count_macs(path).total == 2 * 4 * 16 * 27  # which reads none of it


def test_shapes_that_cannot_be(tmp_path: Path) -> None:
    KERNEL.tofile(tmp_path / "w.bin")
    for shape in ((-4, -3, 3, 3), (2**40, 2**40, 3, 3)):
        with pytest.raises(DoconvError, match=r"has the shape|has 432 bytes"):
            require_own_data(write(tmp_path / "m.onnx", shape=shape, location="w.bin"))
    path = write(tmp_path / "m.onnx", location="w.bin")
    model = onnx.load(path, load_external_data=False)
    for kind in (TensorProto.STRING, TensorProto.UNDEFINED, 99):
        model.graph.initializer[0].data_type = kind
        path.write_bytes(model.SerializeToString())
        with pytest.raises(DoconvError, match=f"external data of type {kind}"):
            require_own_data(path)


@pytest.mark.parametrize("where", ["initializer", "constant", "branch"])
def test_data_of_its_own_is_read(tmp_path: Path, where: str) -> None:
    folder = in_folder(tmp_path)
    np.concatenate([np.zeros(8, np.float32), KERNEL.ravel()]).tofile(folder / "sub" / "w.bin")
    (folder / "w.bin").symlink_to("sub/w.bin")
    for location in ("sub/w.bin", "./sub/w.bin", "w.bin"):
        path = write(folder / "m.onnx", where=where, location=location, offset="32", length=str(SIZE))
        require_own_data(path)
        assert external_files(path) == [location]
        assert compare_graphs(path, path).equal
    if where == "initializer":
        x = np.random.default_rng(1).standard_normal((2, 3, 6, 6)).astype(np.float32)
        (got,) = OnnxSession(path).run([x])
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
        assert np.allclose(got, np.einsum("ncyxij,ocij->noyx", windows, KERNEL), atol=1e-5)


def test_packed_types_take_their_bits(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", shape=(5,), location="w.bin", length="3")
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].data_type = TensorProto.INT4
    path.write_bytes(model.SerializeToString())
    (tmp_path / "w.bin").write_bytes(b"\1\2\3")
    require_own_data(path)
    (tmp_path / "w.bin").write_bytes(b"\1\2")
    with pytest.raises(DoconvError, match="has 2 bytes, expected 3"):
        require_own_data(path)


def test_a_model_by_way_of_a_link_has_its_data_beside_the_link(tmp_path: Path) -> None:
    """As onnxruntime opens it."""
    store = tmp_path / "store"
    store.mkdir()
    write(store / "m.onnx", location="w.bin")
    KERNEL.tofile(store / "w.bin")
    (tmp_path / "m.onnx").symlink_to(store / "m.onnx")
    with pytest.raises(DoconvError, match=r"'w\.bin', cannot be read"):
        require_own_data(tmp_path / "m.onnx")
    shutil.copy(store / "w.bin", tmp_path)
    require_own_data(tmp_path / "m.onnx")


def test_verify_refuses_a_model_with_other_peoples_data(tmp_path: Path) -> None:
    folder = in_folder(tmp_path)
    good, bad = folder / "good.onnx", write(folder / "bad.onnx", location="../outside.bin")
    KERNEL.tofile(folder / "w.bin")
    write(good, location="w.bin")
    assert run_cli("verify", good, "--against", good).exit_code == 0
    for arguments in ((bad, "--against", good), (good, "--against", bad), (bad, "--against", bad)):
        result = run_cli("verify", *arguments)
        assert result.exit_code == 1
        assert "'../outside.bin', points out of the model's folder" in result.stderr
        assert "proven: true" not in result.stdout
