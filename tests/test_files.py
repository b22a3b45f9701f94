"""Writes are whole or not at all, and refusals come early and in words."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from support_cli import names, run_python, tiny_file, trained_tiny, write_model

from doconv_convert.errors import DoconvError
from doconv_convert.files import atomic_write, check_writable, data_name, install_files, stale_data


def test_success_replaces_the_target_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    target.write_bytes(b"old")
    with atomic_write(target) as temporary:
        assert temporary.parent.parent == tmp_path
        assert temporary.parent.name.startswith(".out.onnx.")
        assert stat.S_IMODE(temporary.parent.stat().st_mode) == 0o700
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


def test_data_is_named_by_its_content_and_earlier_data_is_stale(tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    kept = ["out.onnx", "out.onnx.data.txt", "out.onnx2.data", "other.onnx.data"]
    for name in [*kept, "out.onnx.data", "out.onnx.0123456789abcdef.data"]:
        (tmp_path / name).write_bytes(b"x")
    finished = tmp_path / "finished"
    finished.write_bytes(b"weights")
    name = data_name(finished, target)
    assert data_name(finished, target) == name
    finished.write_bytes(b"other weights")
    assert data_name(finished, target) != name
    (tmp_path / name).write_bytes(b"weights")
    assert [path.name for path in stale_data(target, keep=name)] == ["out.onnx.0123456789abcdef.data", "out.onnx.data"]


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
    finished = [tmp_path / "1", tmp_path / "2"]
    for path in finished:
        path.write_bytes(b"external")
    install_files([(finished[0], tmp_path / "a"), (finished[1], tmp_path / "b")])
    folder, out, a, b = (path.stat().st_ino for path in (tmp_path, tmp_path / "out", tmp_path / "a", tmp_path / "b"))
    assert events == [
        *(("sync", out, 7), ("rename", out, 7), ("sync", folder, 0)),
        *(("sync", a, 8), ("sync", b, 8), ("rename", a, 8), ("rename", b, 8), ("sync", folder, 0)),
    ]


def test_a_file_that_replaces_another_takes_its_mode(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.write_bytes(b"old")
    private.chmod(0o600)
    with atomic_write(private) as temporary:
        temporary.write_bytes(b"new")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    (tmp_path / "1").write_bytes(b"data")
    install_files([(tmp_path / "1", tmp_path / "data")], like=private)
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o600


CALLS = ("replace", "link", "fsync", "chmod")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("links", [True, False])
def test_files_that_belong_together_are_all_old_or_all_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, failure: BaseException, links: bool
) -> None:
    """Whatever fails, the first time or later: no new file beside an old one, and nothing left behind."""
    real = {name: getattr(os, name) for name in CALLS}
    countdown = 10**9

    def counted(name: str) -> Any:
        def called(*arguments: Any, **named: Any) -> Any:
            nonlocal countdown
            countdown -= name == call
            if name == call and countdown == 0:
                raise failure
            if name == "link" and not links:
                raise PermissionError(1, "Operation not permitted")
            return real[name](*arguments, **named)

        return called

    for name in CALLS:
        monkeypatch.setattr(os, name, counted(name))
    seen = set()
    for position in range(1, 9):
        place, unfinished = tmp_path / str(position), tmp_path / f"unfinished {position}"
        for folder, content in ((place, b"old"), (unfinished, b"new")):
            folder.mkdir()
            for one in ("model", "certificate"):
                (folder / one).write_bytes(content)
                (folder / one).chmod(0o644)
        (unfinished / "fresh").write_bytes(b"new")
        (place / "stale").write_bytes(b"old")
        moves = [(unfinished / one, place / one) for one in ("model", "fresh", "certificate")]
        countdown = position
        try:
            install_files(moves, [place / "stale"])
        except (DoconvError, KeyboardInterrupt):
            seen.add("old")
            assert {path.name: path.read_bytes() for path in place.iterdir()} == dict.fromkeys(
                ("model", "certificate", "stale"), b"old"
            )
        else:
            seen.add("new")
            assert {path.name: path.read_bytes() for path in place.iterdir()} == dict.fromkeys(
                ("model", "certificate", "fresh"), b"new"
            )
        countdown = 10**9
    copied = call == "link" and isinstance(failure, OSError)  # where there are no hard links, old files are copied
    assert seen == ({"new"} if copied else {"old", "new"})


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
