"""Export: same model, same bytes; what the file says is read back; no traces; children and their deaths."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import save_file
from support import require_ended
from torch import Tensor, nn

from doconv_convert.artifacts.export import onnx_file
from doconv_convert.artifacts.export.child_process import export_in_child, waiting_children
from doconv_convert.artifacts.export.exporter import ExportReport, export_onnx
from doconv_convert.artifacts.export.job import ExportJob, Flags
from doconv_convert.artifacts.sources.source import Source, build
from doconv_convert.errors import DoconvError, UsageError

NET = """
import os
import sys
from torch import nn

INPUT_SHAPE = (1, 3, 32, 32)


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.block = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=4), nn.ReLU())
        self.head = nn.Linear(width, 10)

    def forward(self, image):
        print("a forward that prints")
        features = self.norm(self.stem(image)).relu()
        return self.head((features + self.block(features)).mean((2, 3)))


def make(width=64):
    return Net(width)


def killed():
    os.kill(os.getpid(), 9)


def crashes():
    print("last words", file=sys.stderr)
    sys.stderr.flush()
    os._exit(7)
"""


class BatchBaked(nn.Module):
    """Adds a table made for a batch of two."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(2, 1)


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


@pytest.fixture
def net_file(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(NET)
    return path


@pytest.fixture
def source(net_file: Path) -> Source:
    return Source(f"{net_file}:make")


def inputs(*shape: int) -> tuple[Tensor, ...]:
    return (torch.randn(shape or (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)),)


def job(folder: Path, source: Source, example: tuple[Tensor, ...], **options: object) -> ExportJob:
    state = {name: tensor.contiguous() for name, tensor in build(Source(f"{folder}/net.py:make")).state_dict().items()}
    save_file(state, folder / "state.safetensors")
    np.savez(folder / "inputs.npz", **{f"input_{i}": tensor.numpy() for i, tensor in enumerate(example)})
    paths = {"state_file": folder / "state.safetensors", "inputs_file": folder / "inputs.npz"}
    flags = Flags(**{key: options.pop(key) for key in vars(Flags()) if key in options})  # type: ignore[arg-type]
    return ExportJob(**{"source": source, **paths, "path": folder / "child.onnx", "flags": flags, **options})


def test_the_same_model_gives_the_same_bytes_without_traces_and_is_not_changed(
    source: Source, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = build(source).train()
    model.norm.eval()
    modes = [part.training for part in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reports = [export_onnx(model, inputs(), tmp_path / f"{i}.onnx") for i in range(2)]
    contents = [(tmp_path / f"{i}.onnx").read_bytes() for i in range(2)]
    assert contents[0] == contents[1]
    for trace in ('File "', "net.py", "doconv_source", "stack_trace", str(tmp_path), "pkg.", "site-packages"):
        assert trace.encode() not in contents[0]
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert capfd.readouterr() == ("", "")
    assert reports[0] == ExportReport(
        path=str(tmp_path / "0.onnx"),
        opset=reports[1].opset,
        inputs=[("image", ["batch", 3, 32, 32])],
        outputs=[("linear", ["batch", 10])],
        exporter="dynamo",
        dynamic_batch=True,
        external_data=False,
    )


def test_the_file_computes_what_the_model_does_at_any_batch(source: Source, tmp_path: Path) -> None:
    model = build(source).eval()
    export_onnx(model, inputs(), tmp_path / "out.onnx", input_names=["x"], output_names=["y"])
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    session = ort.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 2, 3):
        (x,) = inputs(batch, 3, 32, 32)
        (y,) = session.run(["y"], {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x).detach())


@pytest.mark.parametrize("opset", [18, 22])
def test_the_opset_asked_for_is_the_one_in_the_file(tmp_path: Path, opset: int) -> None:
    report = export_onnx(nn.Conv2d(3, 4, 3), inputs(), tmp_path / "out.onnx", opset=opset)
    assert report.opset == opset
    assert onnx.load(tmp_path / "out.onnx").opset_import[0].version == opset


def test_an_opset_that_cannot_be_had_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "out.onnx").write_bytes(b"old")
    with pytest.raises(DoconvError, match="cannot write opset 99, got 18: pass `opset` 18"):
        export_onnx(nn.Conv2d(3, 4, 3), inputs(), tmp_path / "out.onnx", opset=99)
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]
    assert (tmp_path / "out.onnx").read_bytes() == b"old"


def test_a_baked_in_batch_gives_a_static_file_and_says_so(tmp_path: Path) -> None:
    report = export_onnx(BatchBaked(), inputs(2, 8), tmp_path / "out.onnx")
    assert not report.dynamic_batch
    assert report.inputs == [("x", [2, 8])]
    with pytest.raises(DoconvError, match=r"'BatchBaked' cannot be exported .* fewer dynamic axes"):
        export_onnx(BatchBaked(), inputs(2, 8), tmp_path / "out.onnx", dynamic={"x": {0: "n"}})


def test_dynamic_axes_are_read_back_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = torch.onnx.export
    monkeypatch.setattr(
        "torch.onnx.export", lambda *args, **options: export(*args, **{**options, "dynamic_shapes": None})
    )
    report = export_onnx(nn.Conv2d(3, 4, 3), inputs(), tmp_path / "out.onnx")
    assert not report.dynamic_batch
    with pytest.raises(DoconvError, match=r"axis 2 of input 'input' was to be dynamic, got 32: .* leave it out"):
        export_onnx(nn.Conv2d(3, 4, 3), inputs(), tmp_path / "new.onnx", dynamic={"input": {2: "height"}})
    assert not (tmp_path / "new.onnx").exists()


def test_what_the_exporter_fell_back_to_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "doconv_convert")
    export_onnx(BatchBaked(), inputs(2, 8), tmp_path / "out.onnx")
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("the export with a dynamic batch failed (")
    assert said.endswith("once more with a static one")


def test_static_and_dynamic_as_asked(tmp_path: Path) -> None:
    net = nn.Conv2d(3, 4, 3)
    static = export_onnx(net, inputs(1, 3, 8, 8), tmp_path / "out.onnx", dynamic_batch=False)
    assert (static.dynamic_batch, static.inputs) == (False, [("input", [1, 3, 8, 8])])
    sizes = {"input": {2: "height", 3: "width"}}
    dynamic = export_onnx(net, inputs(2, 3, 8, 9), tmp_path / "out.onnx", dynamic=sizes)
    assert (dynamic.dynamic_batch, dynamic.inputs) == (True, [("input", ["batch", 3, "height", "width"])])


def test_several_and_nested_inputs_are_named_after_the_arguments(tmp_path: Path) -> None:
    class Several(nn.Module):
        def forward(self, pair: list[Tensor], extra: dict[str, Tensor]) -> Tensor:
            return pair[0] + pair[1] + extra["z"]

    (x,) = inputs(2, 5)
    report = export_onnx(Several(), ([x, x + 1], {"z": x[:1]}), tmp_path / "out.onnx")
    named = [("pair_0", ["batch", 5]), ("pair_1", ["batch", 5]), ("extra", [1, 5])]
    assert report.inputs == named


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_names": ["a", "b"]}, r"expected 1 different input names, one per tensor, got \['a', 'b'\]"),
        ({"dynamic": {"y": {0: "n"}}}, r"dynamic names no input 'y': expected one of \['input'\]"),
        ({"dynamic": {"input": {4: "n"}}}, "input 'input' has no axis 4 for dynamic: expected 0 to 3"),
    ],
)
def test_options_that_do_not_fit_are_usage_errors(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        export_onnx(nn.Conv2d(3, 4, 3), inputs(), tmp_path / "out.onnx", **options)  # type: ignore[arg-type]


def test_a_dynamic_batch_is_not_traced_at_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"batch 2 or more .* got \(1, 3, 8, 8\): repeat the sample"):
        export_onnx(nn.Conv2d(3, 4, 3), inputs(1, 3, 8, 8), tmp_path / "out.onnx")


def test_a_model_that_cannot_be_traced_is_a_short_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DoconvError, match=r"'DataDependent' cannot be exported to ONNX: .*data-dependent") as caught:
        export_onnx(DataDependent().train(), inputs(), tmp_path / "out.onnx")
    assert len(str(caught.value)) < 700
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_an_impossible_place_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(DoconvError, match=r"cannot write '.*': it is a folder"):
        export_onnx(DataDependent(), inputs(), tmp_path)


def test_detectors_and_what_holds_one_go_through_torchscript(tmp_path: Path) -> None:
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8), nn.ReLU())
    backbone.out_channels = 8  # type: ignore[assignment]
    anchors = AnchorGenerator(((16,),), ((1.0,),))
    detector = RetinaNet(backbone, 2, min_size=32, max_size=64, anchor_generator=anchors)

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.detector = detector

        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            detections: list[dict[str, Tensor]] = self.detector(images)
            return detections

    images = list(torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0)))
    reports = [export_onnx(Holder(), (images,), tmp_path / f"{i}.onnx") for i in range(2)]
    assert (reports[0].exporter, reports[0].opset, reports[0].dynamic_batch) == ("torchscript", 18, False)
    assert reports[0].inputs == [("images", [3, 40, 40])]
    content = (tmp_path / "0.onnx").read_bytes()
    assert content == (tmp_path / "1.onnx").read_bytes()
    assert b"site-packages" not in content
    assert b"tests/artifacts" not in content


def test_large_weights_go_beside_and_an_interruption_keeps_the_old_pair(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "net.onnx"
    (folder / "net.onnx.data").write_bytes(b"of an older exporter")

    def run(batch: Tensor) -> Tensor:
        session = ort.InferenceSession(target, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {"image": batch.numpy()})[0])

    def data() -> list[str]:
        return sorted(path.name for path in folder.iterdir() if path.name != "net.onnx")

    monkeypatch.setattr(onnx_file, "ONE_FILE_BYTES", 1000)
    old, new = build(source, seed=0).eval(), build(source, seed=1).eval()
    (x,) = inputs()
    report = export_onnx(old, (x,), target)
    assert report.external_data
    first = data()
    assert len(first) == 1
    torch.testing.assert_close(run(x), old(x).detach())

    replace = os.replace
    with monkeypatch.context() as patched:

        def stop_at_the_graph(start: Path, end: Path) -> None:
            if Path(end) == target:
                raise KeyboardInterrupt
            replace(start, end)

        patched.setattr(os, "replace", stop_at_the_graph)
        with pytest.raises(KeyboardInterrupt):
            export_onnx(new, (x,), target)
    torch.testing.assert_close(run(x), old(x).detach())

    export_onnx(new, (x,), target)
    torch.testing.assert_close(run(x), new(x).detach())
    assert len(data()) == 1
    assert data() != first
    monkeypatch.undo()
    assert not export_onnx(old, (x,), target).external_data
    assert data() == []


@pytest.mark.parametrize("limit", [1000, 10**9])
def test_a_finished_model_is_installed_as_it_is(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(onnx_file, "ONE_FILE_BYTES", limit)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "net.onnx.data").write_bytes(b"stale")
    model = build(source).eval()
    external = export_onnx(model, inputs(), tmp_path / "net.onnx").external_data
    made = {path.name: path.read_bytes() for path in tmp_path.glob("net.onnx*")}
    onnx_file.install_model(tmp_path / "net.onnx", folder / "net.onnx")
    assert external == (limit == 1000)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == made
    assert len(made) == 1 + external
    assert not list(tmp_path.glob("net.onnx*"))
    onnx.load(folder / "net.onnx")


@pytest.mark.usefixtures("own_children")
def test_a_child_exports_the_same_bytes_as_this_process(source: Source, tmp_path: Path) -> None:
    jobs = [job(tmp_path, source, inputs(), path=tmp_path / f"child{i}.onnx", opset=20) for i in range(2)]
    reports = export_in_child(jobs, parallel=True)
    here = export_onnx(build(source), inputs(), tmp_path / "here.onnx", opset=20)
    for i, report in enumerate(reports):
        assert (tmp_path / f"child{i}.onnx").read_bytes() == (tmp_path / "here.onnx").read_bytes()
        assert report.path == str(tmp_path / f"child{i}.onnx")
        assert (report.inputs, report.outputs) == (here.inputs, here.outputs)


@pytest.mark.parametrize(
    ("factory", "args", "message"),
    [
        (
            "killed",
            {},
            r"the process that exports '.*net\.py:killed' to '.*child\.onnx' was killed by SIGKILL: .*out of memory\?",
        ),
        ("crashes", {}, "ended with code 7: last words"),
        ("make", {"width": 32}, r"state\.safetensors' does not fit .*of another shape or kind: '.*' got"),
        ("absent", {}, r"net\.py' has no factory 'absent'"),
    ],
)
def test_what_ends_a_child_is_a_clear_error(
    net_file: Path, tmp_path: Path, factory: str, args: dict[str, int], message: str
) -> None:
    with pytest.raises(DoconvError, match=message):
        export_in_child([job(tmp_path, Source(f"{net_file}:{factory}", args), inputs())])
    assert not (tmp_path / "child.onnx").exists()


def test_a_childs_usage_error_stays_one(source: Source, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dynamic names no input 'y'"):
        export_in_child([job(tmp_path, source, inputs(), dynamic={"y": {0: "n"}})])


@pytest.mark.zoo
@pytest.mark.usefixtures("own_children")
def test_a_child_that_is_used_again_exports_what_a_fresh_one_does(
    net_file: Path, source: Source, tmp_path: Path
) -> None:
    jobs = [job(tmp_path, source, inputs(), path=tmp_path / f"{i}.onnx") for i in range(3)]
    with waiting_children(1, reuse=True) as waiting:
        (child,) = waiting
        export_in_child(jobs[:1], parallel=True, waiting=waiting)
        process = child._process
        with pytest.raises(UsageError, match="dynamic names no input"):
            export_in_child([job(tmp_path, source, inputs(), dynamic={"y": {0: "n"}})], parallel=True, waiting=waiting)
        export_in_child(jobs[1:2], parallel=True, waiting=waiting)
        assert child._process is process
        assert process.poll() is None
        with pytest.raises(DoconvError, match="ended with code 7: last words"):
            export_in_child([job(tmp_path, Source(f"{net_file}:crashes"), inputs())], parallel=True, waiting=waiting)
        # alone, as large models are: a new process, which gives its memory back
        export_in_child(jobs[2:], waiting=waiting)
        assert child._process is not process
        assert child._process.poll() is not None
    contents = {(tmp_path / f"{i}.onnx").read_bytes() for i in range(3)}
    assert len(contents) == 1


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_child_ends_with_its_parent() -> None:
    script = (
        "import os; from doconv_convert.artifacts.export.child_process import Child; child = Child()\n"
        "print(child._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    require_ended(int(ended.stdout))
