"""Text from files is data: one poisonous text in every name of every kind of file, on every medium of every command."""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from support_cli import run_cli, tiny, tiny_file, trained_tiny, write_model

from doconv_convert.artifacts.checkpoints.recipe import METADATA_KEY
from doconv_convert.artifacts.sources.source import Source
from doconv_convert.check.certificate import certificate as certificates
from doconv_convert.check.certificate.verify import PROVEN_BY
from doconv_convert.check.macs.counting import count_macs
from doconv_convert.check.outputs.compare import OutputCheck
from doconv_convert.check.outputs.expected import ReferenceRun
from doconv_convert.check.status import Proof, Status
from doconv_convert.cli.console import Output
from doconv_convert.cli.escapes import annotation, json_text, markdown, printable
from doconv_convert.cli.github import TABLE_BYTES, GithubReport
from doconv_convert.words import LONGEST_TEXT, LONGEST_WORD, visible

# C0, DEL and C1, ANSI and OSC, marks that turn text around or show nothing, line ends of every kind, commands of three
# runners, and what Markdown and HTML read.
CONTROL = (
    "\x07\b\x1b[2J\x1b]8;;http://evil-place\x07\x7f\x85\x9b31m\u202e\u2066\u200b\ufeff\u2028\u2029\U000e0041\ufe0f"
)
COMMANDS = "\r\n::error file=x::signed off\r##[group]x ##vso[task.complete]%0A::add-mask::MACs\n"
MARKUP = "|a| `b` <b>bold</b><!-- @maintainers #1 $x$ :bomb: ~~c~~ **d** [e](http://evil-place) https://evil-place &lt;"
POISON = f"POISON{CONTROL}{COMMANDS}{MARKUP}::warning::POISON"
SURROGATE = POISON.replace("\x07", "\ud800", 1)
# What a file's name can hold.
FILE_NAME = "POISON\x1b[2J\n::error::x\r\u202e##[group]`|@maintainers<b>"


@dataclass(frozen=True)
class Said:
    """What a command left on its media."""

    code: int
    stdout: str
    stderr: str
    summary: str
    page: str


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs a command, checks all that it says on every medium, and returns it."""
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))

    def run(*arguments: Any) -> Said:
        summary.write_text("")
        result = run_cli(*arguments)
        assert not isinstance(result.exception, UnicodeError)
        assert "please report it" not in result.stderr
        assert capfd.readouterr() == ("", "")  # the libraries below say nothing of their own
        page = arguments[arguments.index("--report") + 1] if "--report" in arguments else None
        html = Path(page).read_text(encoding="utf-8") if page is not None and Path(page).exists() else ""
        said = Said(result.exit_code, result.stdout, result.stderr, summary.read_text(encoding="utf-8"), html)
        require_clean(said, as_json="--json" in arguments)
        return said

    return run


def require_clean(said: Said, *, as_json: bool = False) -> None:
    for text in (said.stdout, said.stderr):
        assert [one for one in text if not (one.isprintable() or one == "\n")] == []
        assert re.findall(r"##\w*\[", text) == []
        begun = [line for line in text.split("\n") if line.lstrip().startswith("::")]
        assert [line for line in begun if not re.match(r"::error file=[^:,]*::[^:]", line)] == []
    if as_json and said.stdout:
        assert said.stdout.isascii()
        json.loads(said.stdout)
    require_clean_summary(said.summary)
    require_clean_page(said.page)


def require_clean_summary(summary: str) -> None:
    assert [one for one in summary if not (one.isprintable() or one == "\n")] == []
    assert re.findall(r"<(?!/?(?:span|br|details|summary)>)", summary) == []
    assert re.findall(r"[@$~*`\[]|&(?!#\d+;)|:(?=[^\s<])|#(?!\d+;)", summary) == []
    table: list[int] = []
    for line in summary.split("\n"):
        table = [*table, line.count("|")] if line.startswith("| ") else []
        assert len(set(table)) <= 1, line  # every row has the head's cells
        assert re.match(r"[-+=>]|\d+[.)]", line) is None


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)


def require_clean_page(page: str) -> None:
    assert [one for one in page if not (one.isprintable() or one == "\n")] == []
    assert not Tags(page).found & {"b", "a", "img", "iframe", "link"}


def hostile_onnx(path: Path, text: str = POISON, size: int = 6, kernel: int = 3) -> Path:
    """A convolution, a product and an operator that nobody knows, with the text in every name that a file has."""
    weights = np.random.default_rng(0).standard_normal((4, 3, kernel, kernel)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", [f"{text}x", f"{text}w"], [f"{text}y"], name=text),
        helper.make_node("Relu", [f"{text}y"], [f"{text}z"], name=f"{text}relu", doc_string=text),
    ]
    shape: list[int | str] = [f"{text}dim", 3, size, size]
    graph = helper.make_graph(
        nodes,
        f"{text}graph",
        [helper.make_tensor_value_info(f"{text}x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"{text}z", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weights, f"{text}w")],
        doc_string=text,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name=text, doc_string=text)
    model.ir_version = 8
    onnx.save(model, path)
    return path


def with_unknown_operator(path: Path) -> Path:
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid(f"{POISON}domain", 1))
    name = model.graph.output[0].name
    node = helper.make_node(f"{POISON}Op", [name], ["end"], name=f"{POISON}op", domain=f"{POISON}domain")
    model.graph.node.append(node)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("form", ["text", "json", "github"])
def test_names_of_an_onnx_file(tmp_path: Path, say: Callable[..., Said], form: str) -> None:
    a, b = hostile_onnx(tmp_path / "a.onnx"), hostile_onnx(tmp_path / "b.onnx", size=8)
    unknown = with_unknown_operator(hostile_onnx(tmp_path / "c.onnx"))
    shape = f"{POISON}x=2,3,6,6"
    page = ("--report", tmp_path / "page.html")
    assert "POISON" in say("flops", a, "--format", form).stdout
    assert say("flops", unknown, "--max", "1G", "--format", form).code == 3
    assert say("flops", a, "--against", b, "--format", form).code == 3
    assert say("flops", a, "--against", unknown, "--format", form).code == 3
    assert say("flops", a, "--dim", "absent=3", "--format", form).code == 2
    other = say("verify", b, "--against", a, "--input-shape", shape, "--format", form, *page)
    assert other.code == 3
    assert "POISON" in other.page
    assert say("verify", a, "--against", a, "--input-shape", shape, "--format", form, *page).code == 0
    assert say("verify", a, "--against", unknown, "--input-shape", shape, "--format", form).code in (1, 3)
    if form == "github":
        assert "POISON" in other.summary
        assert other.stdout.count("\n::error file=") > 1


def test_the_other_texts_of_an_onnx_file(tmp_path: Path, say: Callable[..., Said]) -> None:
    """The inputs that it asks for, in words."""
    a = hostile_onnx(tmp_path / "a.onnx")
    assert say("verify", a, "--against", a, "--input-shape", "absent=1,3,6,6").code == 2
    model = onnx.load(a)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = f"{POISON}height"
    onnx.save(model, a)
    assert "POISON" in say("flops", a).stderr
    assert "POISON" in say("verify", a, "--against", a).stderr
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    onnx.save(model, a)
    assert "POISON" in say("verify", a, "--against", a).stderr


@pytest.mark.parametrize("name", [b"\xed\xa0\x80PQRSTU", b"\xff\xfe\x9b[2JPQ"])
def test_names_that_are_no_text(tmp_path: Path, say: Callable[..., Said], name: bytes) -> None:
    path = hostile_onnx(tmp_path / "m.onnx", "QQQQQQQQQ"[: len(name)])
    path.write_bytes(path.read_bytes().replace(b"QQQQQQQQQ"[: len(name)] + b"relu", name + b"relu"))
    said = say("flops", path)
    assert said.code == 1
    assert "which is no UTF-8 text" in said.stderr


@pytest.mark.parametrize(
    ("long", "form"), [("A" * 3_000_000, "github"), ("A b " * 750_000, "text")], ids=["one word", "many"]
)
def test_a_name_of_megabytes(tmp_path: Path, say: Callable[..., Said], long: str, form: str) -> None:
    said = say("flops", hostile_onnx(tmp_path / "m.onnx", long), "--format", form, "--max", "1")
    assert said.code == 3
    assert "characters)..." in said.stdout
    assert len(said.stdout) + len(said.summary) < 200_000
    assert json.loads(json_text([long])) == [long]  # a machine gets it all


def test_a_summary_keeps_to_what_github_shows() -> None:
    report = GithubReport("m.onnx")
    report.table(["node", "MACs"], [["|" * LONGEST_WORD, 1]] * 1000, [1])
    assert len(report.blocks[0]) < TABLE_BYTES + 10_000
    assert re.search(r"and \d\d\d more$", report.blocks[0])


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with hostile names and a certificate that fits it, made without an export."""
    path = hostile_onnx(tmp_path_factory.mktemp("certified") / "m.onnx")
    inputs = [np.random.default_rng(1).standard_normal((2, 3, 6, 6)).astype(np.float32)]
    from doconv_convert.check.outputs.session import run_onnx

    (value,) = run_onnx(path, inputs)[1]
    check = OutputCheck(f"{POISON}z", value.shape, 0.0, 1e-7, 1e-6, 0.0, 1.0, None)
    proof = Proof(str(path), [Status(name, "passed", POISON, (POISON,)) for name in PROVEN_BY])
    proof.macs, proof.count, proof.outputs = 1, count_macs(path), [check]
    reference = ReferenceRun(inputs, [value.astype(np.float64)], [value], 2, {POISON: 1.0})
    origin = certificates.Origin(path, Source("torchvision:resnet18", {"width": POISON}), 17, POISON)
    proof.sensitivity = reference.sensitivity
    certificates.write_certificate(path, proof, reference, origin)
    return path


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a document has a text."""
    if isinstance(value, str):
        yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in pairs:
        yield from leaves(one, (*path, key))


def test_every_text_of_a_certificate(certified: Path, tmp_path: Path, say: Callable[..., Said]) -> None:
    """One after the other; what is the same in another element of a list once."""
    original = certificates.certificate_path(certified)
    good = say("verify", certified, "--certificate", original, "--format", "github", "--report", tmp_path / "page.html")
    assert good.code == 0
    reference = certified.with_name("m.reference.npz")
    (tmp_path / reference.name).write_bytes(reference.read_bytes())
    places = {
        tuple(key for key in place if isinstance(key, str)): place for place in leaves(json.loads(original.read_text()))
    }
    assert len(places) > 30
    shown = 0
    for place in places.values():
        content = json.loads(original.read_text())
        parent = content
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = SURROGATE
        del content["digest"]
        certificate = tmp_path / "m.certificate.json"
        certificate.write_bytes(certificates.rendered({**content, "digest": certificates.digest(content)}))
        form = ("--format", "github") if shown % 2 else ("--json",)
        shown += "POISON" in say("verify", certified, "--certificate", certificate, *form).stdout
    assert shown > 5


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("desk")
    write_model(trained_tiny(folder), folder / "a.safetensors", f"{tiny_file(folder)}:tiny")
    return folder


HOSTILE_NET = f"""
import torch
from torch import nn

POISON = {POISON.replace(".", "-")!r}
INPUT_SHAPE = (1, 2, 6, 6)


def net():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(POISON, nn.Conv2d(2, 4, 3))
            self.add_module(POISON + "weird", type(POISON, (nn.Conv2d,), {{}})(4, 4, 3))
            self.register_parameter(POISON, nn.Parameter(torch.zeros(1)))

        def forward(self, image):
            x = getattr(self, POISON + "weird")(getattr(self, POISON)(image))
            return x.mean((2, 3)) + self._parameters[POISON]

    Net.__name__ = Net.__qualname__ = POISON
    return Net()


def raises():
    raise RuntimeError(POISON)


def number():
    return type(POISON, (), {{}})()
"""
HOSTILE_NET = HOSTILE_NET.replace("self.register_parameter(POISON,", "self.register_parameter(POISON + 'p',").replace(
    "self._parameters[POISON]", "self._parameters[POISON + 'p']"
)


def test_names_of_a_network(tmp_path: Path, say: Callable[..., Said]) -> None:
    (tmp_path / "net.py").write_text(HOSTILE_NET)
    net, out = f"{tmp_path}/net.py:net", tmp_path / "out.safetensors"
    page = ("--report", tmp_path / "page.html")
    planned = say("to-doconv", net, "--dry-run", *page)
    assert planned.code == 0
    assert planned.stdout.count("POISON") > 4
    assert "POISON" in planned.page
    assert "POISON" in say("to-doconv", net, "--dry-run", "--json").stdout
    assert say("to-doconv", net, "-o", out).code == 0
    assert say("fold", out, "--model", net, "-o", tmp_path / "plain.safetensors", "--json").code == 0
    assert say("fold", out, "-o", tmp_path / "plain.safetensors").code == 1
    assert say("to-doconv", f"{tmp_path}/net.py:raises", "--dry-run").code == 1
    assert say("to-doconv", f"{tmp_path}/net.py:number", "--dry-run").code == 1
    assert say("rehearse", net, "--no-export", *page).stdout.count("passed") > 3


def bad_checkpoints(folder: Path, desk: Path) -> Iterator[Path]:
    """Files whose texts end up in errors: keys, metadata, recipes."""
    state = {f"{POISON.replace('.', '-')}.weight": torch.ones(3), **tiny(desk).state_dict()}
    torch.save(state, folder / "keys.pth")
    yield folder / "keys.pth"
    torch.save({SURROGATE: {"a": torch.ones(1)}, "other": {"b": torch.ones(1)}}, folder / "parts.pth")
    yield folder / "parts.pth"
    torch.save({f"{SURROGATE}.D": torch.ones(2, 9, 9), f"{SURROGATE}.W": torch.ones(2, 2, 9)}, folder / "foreign.pth")
    yield folder / "foreign.pth"
    torch.save({SURROGATE: torch.full((1,), float("nan"))}, folder / "nan.pth")
    yield folder / "nan.pth"
    torch.save({"state_dict": SURROGATE, POISON: 3}, folder / "other.pth")
    yield folder / "other.pth"
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {SURROGATE: POISON}}))
    yield index
    site = {"owner": "", "kernel": SURROGATE, "groups": 1, "d_mul": 9}
    good = {"format": 1, "sites": [], "source": None, "aliases": {}, "channels_last": [], "tool_version": SURROGATE}
    recipes: list[Any] = [
        {**good, "sites": [site]},
        {**good, "sites": [{**site, "groups": SURROGATE}]},
        {**good, "sites": [{SURROGATE: 1}]},
        {**good, "aliases": {SURROGATE: POISON}},
        {**good, "channels_last": [SURROGATE]},
        {**good, "format": SURROGATE},
        {**good, "source": {"source": SURROGATE, "args": {}}},
        {**good, "source": {"source": f"torchvision:{SURROGATE}", "args": {}}},
        {**good, "source": {"source": "torchvision:resnet18", "args": {SURROGATE: POISON}}},
        POISON,
    ]
    for number, recipe in enumerate(recipes):
        path = folder / f"recipe{number}.safetensors"
        save_file(tiny(desk).state_dict(), path, metadata={METADATA_KEY: json.dumps(recipe)})
        yield path
    save_file({POISON: torch.ones(1)}, folder / "key.safetensors", metadata={POISON: POISON})
    yield folder / "key.safetensors"


def test_texts_of_checkpoints(tmp_path: Path, desk: Path, say: Callable[..., Said]) -> None:
    net, out = f"{desk}/net.py:tiny", tmp_path / "out.safetensors"
    shown = 0
    for number, path in enumerate(bad_checkpoints(tmp_path, desk)):
        others = ("fold", path, "-o", out), ("to-doconv", net, "--weights", path, "-o", out, "--json")
        for command in (("fold", path, "--model", net, "-o", out, "--format", "github"), others[number % 2]):
            said = say(*command)
            shown += "POISON" in said.stdout + said.stderr
    assert shown > 20


def test_names_of_samples(tmp_path: Path, say: Callable[..., Said]) -> None:
    model, samples = hostile_onnx(tmp_path / "m.onnx"), tmp_path / "samples.npz"
    array = np.ones((2, 3, 6, 6), np.float32)
    np.savez(samples, **{name.replace("/", "-"): array for name in (POISON, f"{POISON}x")})
    said = say("verify", model, "--against", model, "--input", samples)
    assert said.code == 2
    assert "POISON" in said.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows allows no such names")
def test_names_of_files(tmp_path: Path, desk: Path, say: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = hostile_onnx(Path(f"{FILE_NAME}.onnx"), "n")
    text = Path(f"{FILE_NAME}.txt")
    text.write_text("no model")
    place = Path(f"{FILE_NAME}.safetensors")
    net = f"{desk}/net.py:tiny"
    commands: list[tuple[Any, ...]] = [
        ("flops", model, "--max", "1", "--format", "github"),
        ("flops", model, "--json"),
        ("flops", text, "--format", "github"),
        ("flops", f"{text}:{FILE_NAME}"),
        ("verify", model, "--against", text),
        ("verify", model, "--certificate", text, "--report", f"{FILE_NAME}.html"),
        ("verify", model, "--against", model, "--input-shape", "nx=2,3,6,6", "--format", "github"),
        ("fold", text, "--model", net, "-o", place),
        ("fold", desk / "a.safetensors", "--model", net, "-o", place, "--report", f"{FILE_NAME}2.html"),
        ("to-doconv", net, "-o", place),
        ("to-doconv", FILE_NAME, "-o", place),
        ("rehearse", FILE_NAME, "--no-export"),
        ("rehearse", FILE_NAME, "--no-export", "--resume", text),
        (FILE_NAME,),
        ("flops", model, f"--{FILE_NAME}"),
        ("flops", model, "--max", FILE_NAME),
        ("flops", model, "--format", FILE_NAME),
        ("flops", model, "--dim", FILE_NAME),
    ]
    for command in commands:
        said = say(*command)
        assert "POISON" in said.stdout + said.stderr


def test_a_library_that_quotes_the_file(
    tmp_path: Path, say: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that nobody expected: onnxruntime's and onnx's messages have the names in them."""

    def read(*_: object) -> None:
        raise ArithmeticError(POISON)

    monkeypatch.setattr("doconv_convert.workflows.count.count_models", read)
    path = hostile_onnx(tmp_path / "m.onnx")
    result = run_cli("flops", path, "--format", "github")
    assert result.exit_code == 1
    require_clean(Said(1, result.stdout, result.stderr, "", ""))
    assert "POISON" in result.stderr


def test_a_terminal_gets_no_command_either(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Output, "terminal", True)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "40")
    out = Output(as_json=False, quiet=False)
    out.say(f"{'word ' * 8}{POISON} ::error::x", indent=4)
    out.table(["node", "state"], [["::error::x", "passed"], [POISON, f"{'word ' * 5}::error::y"], ["passed", ":bomb:"]])
    said = capsys.readouterr().out
    require_clean(Said(0, said, "", "", ""))
    assert ":bomb:" in said  # no emoji for it


def test_a_notebook_shows_names_as_text() -> None:
    shown = Proof(POISON, [Status(POISON, "failed", POISON, (POISON, POISON))])._repr_html_()
    assert shown.count("POISON") == 2 * 5
    assert shown.isprintable()
    assert Tags(shown).found == {"p", "b", "table", "tr", "td", "br"}
    assert "<b>bold" not in shown


# What each function is for, character by character.
EVERY = [chr(code) for code in [*range(0xA1), 0xAD, 0x61C, *range(0x2000, 0x2070), 0xFEFF, 0xD800, 0xDFFF, 0xE0001]]


@pytest.mark.parametrize("escape", [visible, printable, annotation, markdown, lambda text: json_text([text])])
def test_no_character_is_left_that_steers(escape: Callable[[str], str]) -> None:
    for character in EVERY:
        assert escape(f"a{character}b").replace("\n", "").isprintable(), hex(ord(character))
    assert escape("a layer.0/Conv_1 (3x3)").replace("&#95;", "_").strip('[]\n "') == "a layer.0/Conv_1 (3x3)"


def test_what_is_shown_says_what_was_there() -> None:
    assert visible("a\n\x1b[2J\u202e\ud800\U000e0041\x85é漢") == r"a\n\x1b[2J\u202e\ud800\U000e0041\x85é漢"
    assert printable("::error::x") == r"\x3a:error::x"
    assert printable("  ::error::x") == r"  \x3a:error::x"
    assert printable("aten::conv2d") == "aten::conv2d"
    assert printable("a ##[group]b ###vso[c] #1 [#]") == r"a \x23#[group]b #\x23#vso[c] #1 [#]".replace("##\\", "#\\")
    assert json.loads(json_text({"##[group]": ["::error::", "\x7f\ud800"]})) == {
        "##[group]": ["::error::", "\x7f\ud800"]
    }
    assert "##[" not in json_text(["##[group]"])
    assert annotation("100 %\n") == r"100 %25\n"
    assert markdown("1. a_b|c") == "1&#46; a&#95;b&#124;c"
    assert markdown("@me #1 a:b 4: 5") == ("<span>&#64;</span>me <span>&#35;</span>1 a<span>&#58;</span>b 4: 5")
    assert len(visible("A" * 10**6)) < LONGEST_WORD + 50
    assert len(visible("A b" * 10**6)) < LONGEST_TEXT + 50
    assert visible("A" * LONGEST_WORD) == "A" * LONGEST_WORD
