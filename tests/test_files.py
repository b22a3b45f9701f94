"""Writes are whole or not at all, and refusals come early and in words."""

import json
import os
import stat
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from support_cli import names, run_python, tiny_file, trained_tiny, write_model

from doconv_convert.errors import DoconvError
from doconv_convert.files import atomic_write, check_writable, publish_data, remove_stale_data


def test_success_replaces_the_target_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    target.write_bytes(b"old")
    with atomic_write(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".out.onnx.")
        temporary.write_bytes(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["out.onnx"]


@pytest.mark.parametrize("interruption", [ValueError("half way"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, interruption: BaseException) -> None:
    target = tmp_path / "out.onnx"
    target.write_bytes(b"old")

    def write_half() -> None:
        with atomic_write(target) as temporary:
            temporary.write_bytes(b"half")
            raise interruption

    with pytest.raises(type(interruption)):
        write_half()
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["out.onnx"]


def test_the_new_file_has_an_ordinary_mode(tmp_path: Path) -> None:
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    plain.write_bytes(b"")
    with atomic_write(ours) as temporary:
        temporary.write_bytes(b"x")
    assert stat.S_IMODE(ours.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_full_disk_is_an_error_in_words(tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    with pytest.raises(DoconvError, match=r"cannot write '.*out\.onnx': No space left"), atomic_write(target):
        raise OSError(28, os.strerror(28))
    assert names(tmp_path) == []


def test_an_error_about_another_file_is_not_ours(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "out"):
        (tmp_path / "input").read_bytes()


def test_places_that_take_no_file_are_refused_up_front(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    refusals = {
        tmp_path: "it is a folder; name a file in it",
        tmp_path / "missing" / "out": "the folder '.*missing' does not exist; create it",
        tmp_path / "file" / "out": "'.*file' is not a folder; choose another",
        tmp_path / "pipe": "it is not a regular file",
        tmp_path / ("n" * 300): "File name too long",
    }
    for target, reason in refusals.items():
        with pytest.raises(DoconvError, match=f"cannot write '.*': {reason}"):
            check_writable(target)
        with pytest.raises(DoconvError, match=reason), atomic_write(target):
            pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DoconvError, match="Permission denied"):
        check_writable(tmp_path / "out")


def test_a_refusing_system_is_reported_for_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DoconvError, match=r"cannot write '.*out': Permission denied; .*another folder"):
        check_writable(tmp_path / "out")


def test_check_writable_leaves_no_trace(tmp_path: Path) -> None:
    target = tmp_path / "out"
    check_writable(target)
    assert names(tmp_path) == []
    target.write_bytes(b"old")
    check_writable(target)
    assert target.read_bytes() == b"old"


def test_published_data_is_named_by_its_content_and_stale_data_goes(tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    kept = ["out.onnx", "out.onnx.data.txt", "out.onnx2.data", "other.onnx.data"]
    for name in [*kept, "out.onnx.data", "out.onnx.0123456789abcdef.data"]:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "temporary").write_bytes(b"weights")
    name = publish_data(tmp_path / "temporary", target)
    (tmp_path / "temporary").write_bytes(b"weights")
    assert publish_data(tmp_path / "temporary", target) == name
    (tmp_path / "temporary").write_bytes(b"other weights")
    assert publish_data(tmp_path / "temporary", target) != name
    remove_stale_data(target, keep=name)
    assert names(tmp_path) == sorted([*kept, name])
    assert (tmp_path / name).read_bytes() == b"weights"


def test_content_and_name_reach_the_disk_in_that_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut the target is the old file or the whole new one: the content is synced before the rename, the
    folder after it."""
    events: list[tuple[str, int, int]] = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        found = os.fstat(descriptor)
        events.append(("sync", found.st_ino, found.st_size if stat.S_ISREG(found.st_mode) else 0))
        sync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        events.append(("rename", os.stat(source).st_ino, os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    with atomic_write(tmp_path / "out") as temporary:
        temporary.write_bytes(b"weights")
    (tmp_path / "data").write_bytes(b"external")
    name = publish_data(tmp_path / "data", tmp_path / "m.onnx")
    folder = tmp_path.stat().st_ino
    expected = []
    for path, size in ((tmp_path / "out", 7), (tmp_path / name, 8)):
        file = path.stat().st_ino
        expected += [("sync", file, size), ("rename", file, size), ("sync", folder, 0)]
    assert events == expected


LIMITED = """
import json, resource, sys
from typer.testing import CliRunner
from doconv_convert.artifacts.export import onnx_file
from doconv_convert.files import atomic_write
from doconv_convert.cli.app import app
from doconv_convert.errors import DoconvError

out, source, finished, *commands = sys.argv[1:]
import doconv_convert.workflows.fold
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
said = []
for command in commands:
    result = CliRunner().invoke(app, command.split("|"))
    said.append([result.exit_code, result.stderr])
try:
    onnx_file.write(onnx_file.ir.load(finished), onnx_file.Path(out) / "a.onnx")
except DoconvError as error:
    said.append([1, "error: " + str(error)])
print(json.dumps(said))
"""


def test_a_file_size_limit_in_mid_write_leaves_the_old_file(tmp_path: Path) -> None:
    """Python ignores the signal, so that the write fails with an error: in words, and without leftovers."""
    source, out = f"{tiny_file(tmp_path)}:tiny", tmp_path / "out"
    out.mkdir()
    for name in ("a.safetensors", "b.safetensors", "a.onnx"):
        (out / name).write_bytes(b"old")
    write_model(trained_tiny(tmp_path), tmp_path / "a.pth")
    model = helper.make_model(helper.make_graph([], "g", [], [], [numpy_helper.from_array(np.ones(9000), "w")]))
    onnx.save(model, tmp_path / "m.onnx")
    commands = [
        f"to-doconv|{source}|-o|{out}/a.safetensors",
        f"fold|{tmp_path}/a.pth|--model|{source}|-o|{out}/b.safetensors",
    ]
    said = json.loads(run_python(LIMITED, out, source, tmp_path / "m.onnx", *commands))
    for (code, error), target in zip(said, ("a.safetensors", "b.safetensors", "a.onnx"), strict=True):
        assert code == 1
        assert error.startswith(f"error: cannot write '{out / target}': ")
        assert "File too large" in error
        assert "report it" not in error
        assert (out / target).read_bytes() == b"old"
    assert names(out) == ["a.onnx", "a.safetensors", "b.safetensors"]
