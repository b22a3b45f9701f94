"""Certificates: written by `fold --onnx`, checked without torch, refused where anything was changed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from support import inexact_session, varied_images, wrong_where
from support_cli import ROOT, ConfinedHere, ExportsHere, names, run_cli, run_python, trained, write_model

import doconv_convert
from doconv_convert.artifacts.export import child_process, onnx_file
from doconv_convert.artifacts.models import SourceModel, find_inputs
from doconv_convert.artifacts.sources.source import build, parse_source
from doconv_convert.check import confined
from doconv_convert.check.certificate import certificate as certificates
from doconv_convert.check.certificate import outputs as outputs_module
from doconv_convert.check.certificate.certificate import SCHEMA
from doconv_convert.check.certificate.reading import digest
from doconv_convert.check.certificate.verify import verify_certificate
from doconv_convert.check.outputs.compare import CEILING, ONNX_BOUND
from doconv_convert.check.torch_runs import memory
from doconv_convert.rewrite.options import Options
from doconv_convert.workflows import fold as releases
from doconv_convert.workflows.trained_model import load_trained

# A small output, which is kept whole, and one of 3 x 8 x 64 x 64 = 98,304 elements, which is kept as a sketch.
NET = """
import torch
from torch import nn

INPUT_SHAPE = (1, 3, 64, 64)


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, 8, 3, padding=1, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, image):
        x = self.second(torch.relu(self.norm(self.first(image))))
        return self.head(x.mean((2, 3))), x


def make(width=8):
    return Net(width)
"""

WITHOUT_TORCH = """
import sys
for name in ("torch", "torchvision", "onnxscript", "onnx_ir", "safetensors", "timm"):
    sys.modules[name] = None  # importing it raises
from doconv_convert.cli.app import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    print("code", end.code)
"""


@pytest.fixture(autouse=True)
def files_are_read_in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "really_confined" not in request.fixturenames:
        monkeypatch.setattr(confined, "Confined", ConfinedHere)


@pytest.fixture
def really_confined() -> None:
    """A test that asks for this has the process with its limits."""


def fold_here(folder: Path, checkpoint: str = "a", target: str = "m", verify: bool = True) -> None:
    """As `fold --onnx`, exporting in this process: children of its own cost seconds, and one test has them."""
    source = parse_source(f"{folder / 'net.py'}:make")
    loaded = load_trained(folder / f"{checkpoint}.pth", source, Options())
    inputs = find_inputs(SourceModel(loaded.trained, source), None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child_process, "Child", ExportsHere)
        patch.setattr(memory, "LARGE", 0)  # exports change torch for the whole process: none beside the proof's runs
        made = releases.fold_and_prove(loaded, inputs, onnx=folder / f"{target}.onnx", verify=verify, certify=True)
    assert made.certificate == (folder / f"{target}.certificate.json" if verify else None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """m.onnx with its certificate, and that of another training, n.onnx."""
    folder = tmp_path_factory.mktemp("certificate")
    (folder / "net.py").write_text(NET)
    for seed, (checkpoint, target) in enumerate((("a", "m"), ("b", "n"))):
        model = build(parse_source(f"{folder / 'net.py'}:make"), seed=seed)
        write_model(trained(model, varied_images(8, 3, 64, 64)), folder / f"{checkpoint}.pth")
        fold_here(folder, checkpoint, target)
    return folder


@pytest.fixture
def files(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    for path in made.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    return tmp_path


def verify(folder: Path, model: str = "m", certificate: str = "m") -> Any:
    return run_cli("verify", folder / f"{model}.onnx", "--certificate", folder / f"{certificate}.certificate.json")


def failed(folder: Path, **options: str) -> set[str]:
    """The checks that fail; that there is one is exit code 3."""
    result = run_cli(
        *("verify", folder / f"{options.get('model', 'm')}.onnx", "--json"),
        *("--certificate", folder / f"{options.get('certificate', 'm')}.certificate.json"),
    )
    assert result.exit_code == 3, result.stdout + result.stderr
    said = json.loads(result.stdout)
    assert said["proven"] is False
    return {status["name"] for status in said["statuses"] if status["state"] == "failed"}


def content_of(folder: Path) -> Any:
    return json.loads((folder / "m.certificate.json").read_text())


def sign(folder: Path, content: dict[str, Any]) -> None:
    """The certificate with that content and a digest that fits it, as somebody would forge it."""
    content = {key: value for key, value in content.items() if key != "digest"}
    text = json.dumps({**content, "digest": digest(content)}, indent=1) + "\n"
    (folder / "m.certificate.json").write_text(text)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x20
    path.write_bytes(data)


@pytest.mark.parametrize("optimized", [True, False])
def test_the_outputs_are_checked_with_optimizations_and_without(
    files: Path, monkeypatch: pytest.MonkeyPatch, optimized: bool
) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", wrong_where(optimized))
    assert failed(files) == {"outputs"}


def test_a_fold_writes_a_certificate_that_holds(made: Path) -> None:
    assert {"m.certificate.json", "m.onnx", "m.reference.npz"} < set(names(made))
    content = content_of(made)
    assert content["proven"] is True
    assert [check["name"] for check in content["checks"]] == ["fold", "graph", "macs", "outputs", "coverage"]
    assert [one["kept"] for one in content["outputs"]["tensors"]] == ["whole", "sketch"]
    assert content["source"]["source"] == "net.py:make"
    assert str(made) not in (made / "m.certificate.json").read_text()
    result = verify(made)
    assert result.exit_code == 0, result.stdout
    assert "proven: true" in result.stdout
    assert doconv_convert.verify(made / "m.onnx", certificate=made / "m.certificate.json").proven
    assert not doconv_convert.verify(made / "n.onnx", certificate=made / "m.certificate.json").proven


def test_the_certificate_follows_the_published_schema(made: Path) -> None:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(content_of(made))
    for key in content_of(made):
        assert not validator.is_valid({name: value for name, value in content_of(made).items() if name != key}), key
    assert not validator.is_valid({**content_of(made), "extra": 1})


def test_it_is_checked_where_torch_cannot_be_imported(made: Path) -> None:
    said = run_python(WITHOUT_TORCH, "verify", made / "m.onnx", "--certificate", made / "m.certificate.json")
    assert said.endswith("code 0\n")
    assert "proven: true" in said
    said = run_python(WITHOUT_TORCH, "verify", made / "n.onnx", "--certificate", made / "m.certificate.json")
    assert said.endswith("code 3\n")
    said = run_python(WITHOUT_TORCH, "flops", made / "m.onnx", "--against", made / "n.onnx", "--max", "1G")
    assert said.endswith("code 0\n")


def test_the_same_command_twice_writes_the_same_bytes(files: Path) -> None:
    """And so does the command line, with its exporting processes."""
    command = ["fold", files / "a.pth", "--model", f"{files / 'net.py'}:make", "--onnx", files / "m.onnx"]
    before = {name: (files / name).read_bytes() for name in ("m.certificate.json", "m.reference.npz", "m.onnx")}
    for name in before:
        (files / name).unlink()
    result = run_cli(*command, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["certificate"] == str(files / "m.certificate.json")
    assert {name: (files / name).read_bytes() for name in before} == before


def test_without_a_proof_no_earlier_certificate_stays(files: Path) -> None:
    fold_here(files, verify=False)
    assert not {"m.certificate.json", "m.reference.npz"} & set(names(files))


def test_a_flipped_byte_anywhere_in_the_certificate_is_refused(files: Path) -> None:
    path = files / "m.certificate.json"
    whole = path.read_bytes()
    exponent = whole.index(b"e-0")  # 1e-07 and 1E-07 are one number
    for position in (*range(0, len(whole), 101), exponent, len(whole) - 2):
        flip(path, position)
        proof = verify_certificate(files / "m.onnx", path)
        assert proof.state("certificate") == "failed", whole[position - 10 : position + 10]
        path.write_bytes(whole)
    flip(path, len(whole) // 2)
    assert failed(files) == {"certificate"}


NO_CERTIFICATES = ["", "{}", "[1]", "null", '{"format": NaN}', "[" * 100_000, "\xff", '{"a": 1e999}']


@pytest.mark.parametrize("text", [*NO_CERTIFICATES, f'{{"a": {"9" * 5000}}}', '{"a": 1, "b": 2, "a": 1}'])
def test_what_is_no_certificate_is_refused(files: Path, text: str) -> None:
    (files / "m.certificate.json").write_text(text, encoding="latin-1")
    assert failed(files) == {"certificate"}


@pytest.mark.parametrize(
    ("found", "written"),
    [
        (b'"total": ', b'"total": 1, "total": '),
        (b'"total": ', b'"total": ' + b"9" * 400),
        (b'"samples": ', b'"samples": 1e999'),
    ],
)
def test_numbers_and_names_that_readers_take_differently_are_refused(files: Path, found: bytes, written: bytes) -> None:
    """Also where the digest is made to fit what Python would read."""
    path = files / "m.certificate.json"
    text = path.read_bytes().replace(found, written, 1)
    path.write_bytes(text.replace(b"1e9994", b"1e999"))
    assert failed(files) == {"certificate"}


def test_what_is_no_regular_file_is_not_opened(files: Path) -> None:
    """A pipe would wait for ever."""
    for name in ("m.certificate.json", "m.reference.npz", "m.onnx"):
        kept = (files / name).read_bytes()
        (files / name).unlink()
        os.mkfifo(files / name)
        result = verify(files)
        assert result.exit_code == (3 if name == "m.reference.npz" else 1)
        assert "Traceback" not in result.stderr
        (files / name).unlink()
        (files / name).write_bytes(kept)
    assert verify(files).exit_code == 0


def test_nothing_is_opened_behind_a_wrong_hash(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(ConfinedHere, "call", opened)
    for name in ("m.onnx", "m.reference.npz"):
        kept = (files / name).read_bytes()
        flip(files / name, len(kept) // 2)
        assert failed(files) == {"files"}
        (files / name).write_bytes(kept)
    with pytest.raises(AssertionError, match="opened"):
        verify_certificate(files / "m.onnx", files / "m.certificate.json")


def certify_anew(folder: Path) -> None:
    """The hashes of the files as they are now, in a certificate whose digest fits."""
    content = content_of(folder)
    content["onnx"]["sha256"] = certificates.content_hash(folder / "m.onnx")
    content["outputs"]["reference"]["sha256"] = certificates.content_hash(folder / "m.reference.npz")
    sign(folder, content)


@pytest.mark.parametrize("packed", [True, False])
def test_a_side_file_that_unpacks_to_more_is_not_unpacked(files: Path, packed: bool) -> None:
    with np.load(files / "m.reference.npz") as arrays:
        values = dict(arrays)
    if packed:
        np.savez_compressed(files / "m.reference.npz", **values)
    else:
        np.savez(files / "m.reference.npz", **{**values, "output_0": np.zeros(100_000)})
    certify_anew(files)
    assert failed(files) == {"outputs"}
    said = verify_certificate(files / "m.onnx", files / "m.certificate.json").statuses[-1].detail
    assert "is packed, or not as the certificate says" in said


def test_a_forged_norm_widens_no_bound(files: Path) -> None:
    """Of an output that is kept as a sketch, the error is relative to the certificate's norm."""
    content = content_of(files)
    content["outputs"]["tensors"][1]["norm"] *= 1000
    sign(files, content)
    assert failed(files) == {"outputs"}


def test_a_forged_error_allows_no_more_than_the_ceiling(files: Path) -> None:
    content = content_of(files)
    content["outputs"]["tensors"][0]["plain_error"] = 1e9
    sign(files, content)
    with np.load(files / "m.reference.npz") as arrays:
        values = dict(arrays)
    for factor, code in ((0.5, 0), (2.0, 3)):
        np.savez(files / "m.reference.npz", **{**values, "output_0": values["output_0"] * (1 + factor * CEILING)})
        certify_anew(files)
        assert verify(files).exit_code == code


def test_a_model_that_does_not_end_is_ended(files: Path, really_confined: None) -> None:
    """An endless Loop beside the network, certified by another hand."""
    model = onnx.load(files / "m.onnx")
    value = onnx.helper.make_tensor_value_info
    body = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["go"], ["on"]), onnx.helper.make_node("Add", ["s", "s"], ["t"])],
        "body",
        [value("i", 7, []), value("go", 9, []), value("s", 1, [])],
        [value("on", 9, []), value("t", 1, [])],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1), "one_more"))
    model.graph.node.insert(0, onnx.helper.make_node("Loop", ["", "", "one_more"], ["endless"], body=body))
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    model.graph.node.insert(1, onnx.helper.make_node("Mul", ["endless", first.input[0]], ["scaled"]))
    first.input[0] = "scaled"
    onnx.save(model, files / "m.onnx")
    certify_anew(files)
    proof = verify_certificate(files / "m.onnx", files / "m.certificate.json", timeout=2)
    assert proof.state("outputs") == "failed"
    assert "took more than 2 s of work" in proof.statuses[-1].detail


def test_line_ends_as_windows_writes_them_are_no_change(files: Path) -> None:
    path = files / "m.certificate.json"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert verify(files).exit_code == 0


def test_the_three_files_may_be_renamed(files: Path) -> None:
    for suffix in (".onnx", ".certificate.json", ".reference.npz"):
        (files / f"m{suffix}").rename(files / f"release{suffix}")
    assert verify(files, model="release", certificate="release").exit_code == 0


def test_a_flipped_byte_in_the_model_is_refused(files: Path) -> None:
    flip(files / "m.onnx", (files / "m.onnx").stat().st_size // 2)
    assert "files" in failed(files)


def test_a_flipped_byte_in_the_side_file_is_refused(files: Path) -> None:
    flip(files / "m.reference.npz", 2000)
    assert "files" in failed(files)


def test_another_models_certificate_is_refused(files: Path) -> None:
    """Of the same architecture, so that the MACs are equal and nothing but bytes and outputs differ."""
    assert failed(files, model="n") == {"files"}


@pytest.mark.parametrize(
    "path",
    [
        ("macs", "total"),
        ("macs", "nodes", 0, "macs"),
        ("outputs", "tensors", 0, "bound"),
        ("outputs", "tensors", 0, "plain_error"),
        ("checks", 3, "detail"),
        ("version",),
    ],
)
def test_an_edited_figure_is_refused(files: Path, path: tuple[Any, ...]) -> None:
    content = content_of(files)
    *parents, last = path
    owner = content
    for key in parents:
        owner = owner[key]
    owner[last] = owner[last] + (" and better" if last == "detail" else 1)
    (files / "m.certificate.json").write_text(json.dumps(content, indent=1) + "\n")
    assert failed(files) == {"certificate"}


def test_what_can_be_found_out_is_not_believed(files: Path) -> None:
    """Figures forged together with the digest: they are found out anew."""
    honest = content_of(files)
    for forge, expected in (
        (lambda c: c["macs"]["nodes"][0].update(macs=1), "macs"),
        (lambda c: c["macs"].update(total=1), "macs"),
        (lambda c: c["macs"]["uncounted"].update(Loop=1), "macs"),
        (lambda c: c["onnx"].update(sha256="0" * 64), "files"),
        (lambda c: c["outputs"]["reference"].update(sha256="0" * 64), "files"),
        (lambda c: c["outputs"]["inputs"][0].update(sha256="0" * 64), "outputs"),
        (lambda c: c["outputs"]["tensors"][0].update(name="other"), "outputs"),
        (lambda c: c["checks"][1].update(state="not checked"), "certificate"),
        (lambda c: c.update(checks=[]), "certificate"),
        (lambda c: c["checks"].pop(1), "certificate"),
        (lambda c: c["outputs"].update(tensors=[]), "outputs"),
        (lambda c: c.pop("macs"), "certificate"),
        (lambda c: c["outputs"]["tensors"][0].update(shape="large"), "certificate"),
    ):
        content = json.loads(json.dumps(honest))
        forge(content)
        sign(files, content)
        assert expected in failed(files)
    sign(files, honest)
    assert verify(files).exit_code == 0


@pytest.mark.parametrize("output", [0, 1])
def test_outputs_are_held_to_the_proofs_bound(files: Path, output: int) -> None:
    """The values of one output moved by four times their bound, and all hashes forged: whole, and as a sketch."""
    content = content_of(files)
    with np.load(files / "m.reference.npz") as arrays:
        values = dict(arrays)
    bound = content["outputs"]["tensors"][output]["bound"]
    moved = np.random.default_rng(0).standard_normal(values[f"output_{output}"].shape)
    norm = content["outputs"]["tensors"][output]["norm"]
    for factor, code in ((0.01, 0), (4.0, 3)):
        step = moved * (factor * bound * norm / np.linalg.norm(moved))
        arrays = {**values, f"output_{output}": values[f"output_{output}"] + step}
        np.savez(files / "m.reference.npz", **arrays)
        content["outputs"]["reference"]["sha256"] = certificates.content_hash(files / "m.reference.npz")
        sign(files, content)
        assert verify(files).exit_code == code
    assert failed(files) == {"outputs"}


def test_a_kernel_changed_by_a_thousandth_is_refused_by_its_outputs(files: Path) -> None:
    """Also where the hash is forged."""
    import onnx

    model = onnx.load(files / "m.onnx")
    kernel = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    noise = 1 + 1e-3 * np.random.default_rng(0).standard_normal(kernel.dims)
    kernel.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(kernel) * noise).astype(np.float32), kernel.name))
    onnx.save(model, files / "m.onnx")
    content = content_of(files)
    content["onnx"]["sha256"] = certificates.content_hash(files / "m.onnx")
    sign(files, content)
    assert failed(files) == {"outputs"}


def test_the_runtimes_own_rounding_is_no_fault(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here onnxruntime's float32 sums are made worse, those in float64 are not."""

    def outputs(error: float) -> Any:
        monkeypatch.setattr(outputs_module, "OnnxSession", inexact_session(error))
        return verify_certificate(files / "m.onnx", files / "m.certificate.json").statuses[-1]

    assert "computed in float64" not in outputs(0.0).detail
    told = outputs(1e-5)
    assert told.state == "passed"
    assert "; sums and sigmoids computed in float64, since in float32 'linear' is off by 1.0e-05" in told.detail
    assert outputs(2 * ONNX_BOUND).state == "failed"


def test_external_data_is_hashed_too(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "ONE_FILE_BYTES", 1000)
    fold_here(files)
    (data,) = (path for path in files.iterdir() if path.suffix == ".data")
    assert [one["name"] for one in content_of(files)["onnx"]["external"]] == [data.name]
    assert verify(files).exit_code == 0
    flip(data, data.stat().st_size // 2)
    assert "files" in failed(files)
    data.unlink()
    assert "files" in failed(files)


def test_inputs_too_large_to_copy_are_asked_for(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from doconv_convert.check.certificate import side_file

    with np.load(files / "m.reference.npz") as arrays:
        np.savez(files / "inputs.npz", image=arrays["input_0"])
        np.savez(files / "others.npz", image=arrays["input_0"] + 1)
    monkeypatch.setattr(side_file, "INPUT_BYTES", 1000)
    fold_here(files)
    with np.load(files / "m.reference.npz") as arrays:
        assert "input_0" not in arrays
    command = ["verify", files / "m.onnx", "--certificate", files / "m.certificate.json"]
    result = run_cli(*command)
    assert result.exit_code == 2
    assert "--input FILE.npz" in result.stderr
    assert run_cli(*command, "--input", files / "inputs.npz").exit_code == 0
    assert run_cli(*command, "--input", files / "others.npz").exit_code == 3


def test_errors_name_the_file(files: Path) -> None:
    result = verify(files, certificate="absent")
    assert result.exit_code == 1
    assert "absent.certificate.json' cannot be read" in result.stderr
    result = verify(files, model="absent")
    assert result.exit_code == 1
    sign(files, {**content_of(files), "version": 2})
    result = verify(files)
    assert result.exit_code == 1
    assert "of version 2, expected 1: use the doconv-convert that wrote it" in result.stderr
    (files / "n.reference.npz").unlink()
    assert "files" in failed(files, model="n", certificate="n")
    both = ["--against", files / "n.onnx", "--certificate", files / "n.certificate.json"]
    assert run_cli("verify", files / "n.onnx", *both).exit_code == 2
    assert run_cli("verify", files / "n.onnx").exit_code == 2


@pytest.mark.zoo
def test_the_actions_steps_pass_and_fail_in_an_environment_without_torch(made: Path, tmp_path: Path) -> None:
    """The wheel without its dependencies, onnx, onnxruntime, typer, rich and numpy: what action.yml installs."""
    build_wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT]
    subprocess.run(build_wheel, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "run_action.py", wheel, made / "m.onnx"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok  ") == 8
