"""`--report`: one self-contained page that holds what the JSON says, whatever the names are."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from support_cli import names, run_cli, tiny_file, trained_tiny, write_model
from support_report import COMMANDS, HOSTILE, document, page, rehearsed

from doconv_convert import DoconvError
from doconv_convert.cli.report.pictures import linear_bars, log_bars
from doconv_convert.cli.report.render import render, write_report

# "Must show" of issue 10.
LARGEST = 2_000_000


class Seen(HTMLParser):
    """The elements of a page, their attributes, and its text but for script and style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] not in (["script"], ["style"]):
            self.text += data


@pytest.mark.parametrize("command", COMMANDS)
def test_hostile_names_are_text(command: str) -> None:
    plain, hostile = page(command, "TEXT", ["LAYER", "LAYER.1"]), page(command, HOSTILE, [HOSTILE, f"{HOSTILE}.1"])
    expected, got = Seen(plain), Seen(hostile)
    # Nothing but text and attributes' values differs: the elements are the same.
    assert got.tags == expected.tags
    assert [(tag, name) for tag, name, _ in got.attributes] == [(tag, name) for tag, name, _ in expected.attributes]
    assert got.tags.count("script") == 1
    shown = HOSTILE.replace("\u202e", "\\u202e")  # which would turn the rest of a line around
    assert got.text.count(shown) == expected.text.count("TEXT") + expected.text.count("LAYER")
    assert got.text.count(shown) > 5
    assert "\u202e" not in hostile
    assert "49" not in got.text.replace("1.49", "")  # jinja2 does not read the names either


@pytest.mark.parametrize("command", COMMANDS)
def test_a_page_asks_for_nothing(command: str) -> None:
    seen = Seen(text := page(command, "TEXT", ["LAYER"]))
    policies = [value or "" for tag, name, value in seen.attributes if tag == "meta" and name == "content"]
    policy = r"default-src 'none'; script-src 'sha256-\S{44}'; style-src 'sha256-\S{44}'"
    assert any(re.fullmatch(policy, one) for one in policies)
    assert not {"link", "img", "iframe", "object", "base", "form"} & set(seen.tags)
    assert not [name for _, name, _ in seen.attributes if name in ("src", "href", "style") or name.startswith("on")]
    assert "http:" not in text
    assert "https:" not in text
    assert text == page(command, "TEXT", ["LAYER"])


def test_what_the_pictures_show_is_in_the_table() -> None:
    text = page("fold", "TEXT", [f"layer.{index}" for index in range(3)])
    pictures = re.findall(r'<figure data-table="(\w+)" data-key="(\w+)"', text)
    assert [key for _, key in pictures] == ["macs", "added_parameters", "d_moved", "kernel_changed", "sensitivity"]
    for table, key in pictures:
        assert f'<table id="{table}">' in text
        assert f'data-key="{key}"' in text.split("<table", 1)[1]
    assert text.count("<tr>\n") + text.count("<tr><") == 3 + 1 + 2  # layers, outputs, two heads


def test_bars_have_the_heights_of_their_values() -> None:
    bars = linear_bars([1.0, None, 4.0, 0.0])
    assert bars.high == 4.0
    assert bars.above == "M0.1 100v-25h0.8v25zM2.1 100v-100h0.8v100z"
    bars = log_bars([100.0, 0.0, None, 0.1], line=1.0)
    assert (bars.low, bars.high) == (0.1, 100.0)
    assert bars.line == pytest.approx(200 / 3)
    assert bars.above == "M0.1 66.67v-66.67h0.8v66.67z"
    assert bars.below == "M1.1 66.67v33.33h0.8v-33.33zM3.1 66.67v33.33h0.8v-33.33z"
    assert linear_bars([0.0, 0.0]).above == ""


def test_large_documents_stay_small() -> None:
    long = "backbone.features.stage3.block{}.attention.projection.conv"
    one = render("fold", document("fold", "m.onnx", [long.format(i) for i in range(1000)]))
    layers = [long.format(i) for i in range(400)]
    zoo = render("rehearse", {"models": [rehearsed(f"torchvision:model_{i}", layers) for i in range(121)]})
    assert 100_000 < len(one.encode()) < LARGEST
    assert 50_000 < len(zoo.encode()) < LARGEST


def test_a_zoo_is_a_matrix() -> None:
    seen = Seen(page("rehearse many", "net", ["a", "b"]))
    assert "1 of 2 models passed, 1 failed" in seen.text
    assert "prove failed" in seen.text
    assert "1 of 2" in seen.text  # kernels seen: 'a' is below the line


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.html"
    write_report(path, "verify", document("verify", "name with \udce9 and \x07", ["a"]))
    assert "name with \\udce9 and \\x07" in path.read_text(encoding="utf-8")
    with pytest.raises(DoconvError, match="does not exist; create it"):
        write_report(tmp_path / "none" / "out.html", "verify", document("verify", "m", ["a"]))
    with pytest.raises(KeyError):
        write_report(path, "verify", {})
    assert names(tmp_path) == ["out.html"]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A trained net with hostile names around it, folded to a proven file with a report, and the JSON."""
    folder = tmp_path_factory.mktemp("<b>&amp;net")
    source = f"{tiny_file(folder)}:tiny"
    write_model(trained_tiny(folder, d_mul="K+2"), folder / "a.pth")
    result = run_cli(
        *("fold", folder / "a.pth", "--model", source, "--onnx", folder / "m.onnx"),
        *("--report", folder / "fold.html", "--json"),
    )
    assert result.exit_code == 0, result.stderr
    return folder, json.loads(result.stdout)


def test_fold_tells_how_far_each_layer_moved(released: tuple[Path, dict[str, Any]]) -> None:
    folder, said = released
    trained = trained_tiny(folder, d_mul="K+2")
    layers = {one["name"]: one for one in said["layers"]}
    assert list(layers) == ["first", "grouped", "depthwise", "pointwise"]
    for name in ("first", "grouped", "depthwise"):
        conv = trained.get_submodule(name)
        d, kernel, w = (t.detach().double() for t in (conv.D, conv.effective_kernel(), conv.weight_first_slots))
        identity = torch.eye(d.shape[1], d.shape[2]).expand_as(d)
        assert layers[name]["d_moved"] == pytest.approx(float(d.norm() / identity.norm()), rel=1e-6)
        assert layers[name]["kernel_changed"] == pytest.approx(float((kernel - w).norm() / w.norm()), rel=1e-5)
        assert layers[name]["kernel_changed"] > 0.01
        assert layers[name]["added_parameters"] == d.numel() + conv.weight_extra.numel()
        assert layers[name]["d_mul"] == d.shape[2]
    assert layers["pointwise"]["d_moved"] is None
    assert sum(one["macs"] for one in said["layers"]) == said["proof"]["macs"] - 8 * 3  # all but the linear head
    seen = Seen((folder / "fold.html").read_text())
    assert "proven: true" in seen.text
    assert "m.onnx" in seen.text
    assert "&amp;net" not in seen.text  # the folder
    assert "b" not in seen.tags
    for name in layers:
        assert name in seen.text


def test_verify_and_plans_have_reports_too(released: tuple[Path, dict[str, Any]]) -> None:
    folder, said = released
    source = folder / "net.py"
    result = run_cli(
        *("verify", folder / "m.onnx", "--against", folder / "a.pth", "--model", f"{source}:tiny"),
        *("--report", folder / "verify.html", "--json"),
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["layers"] == said["layers"]
    assert "How far D moved" in Seen((folder / "verify.html").read_text()).text
    certificate = folder / "m.certificate.json"
    arguments = ("verify", folder / "m.onnx", "--certificate", certificate, "--report", folder / "certified.html")
    assert run_cli(*arguments).exit_code == 0
    assert "certificate" in Seen((folder / "certified.html").read_text()).text
    # A failed check is what a report is for: the same file against other weights.
    write_model(trained_tiny(folder, "tiny"), folder / "b.pth")
    result = run_cli(
        *("verify", folder / "m.onnx", "--against", folder / "b.pth", "--model", f"{source}:tiny"),
        *("--report", folder / "failed.html"),
    )
    assert result.exit_code == 3
    assert "proven: false" in Seen((folder / "failed.html").read_text()).text
    result = run_cli("to-doconv", f"{source}:tiny", "--dry-run", "--report", folder / "plan.html")
    assert result.exit_code == 0, result.stderr
    planned = Seen((folder / "plan.html").read_text()).text
    assert "depthwise" in planned
    assert "optimizer state, Adam" in planned


def test_a_rehearsal_has_a_report(tmp_path: Path) -> None:
    source = tiny_file(tmp_path)
    report = tmp_path / "r.html"
    result = run_cli("rehearse", "--no-export", f"{source}:tiny", f"{source}:raises", "--report", report)
    assert result.exit_code == 3
    seen = Seen(report.read_text())
    assert "1 of 2 models passed, 1 failed" in seen.text
    assert "out of luck" in seen.text


def test_a_report_never_replaces_a_file_of_the_command(tmp_path: Path) -> None:
    write_model(trained_tiny(tmp_path), tmp_path / "a.pth")
    before = (tmp_path / "a.pth").read_bytes()
    for report, code in ((tmp_path / "a.pth", 2), (tmp_path / "none" / "r.html", 1)):
        result = run_cli("fold", tmp_path / "a.pth", "-o", tmp_path / "p.safetensors", "--report", report)
        assert result.exit_code == code
        assert str(report) in result.stderr
    assert (tmp_path / "a.pth").read_bytes() == before
    assert not (tmp_path / "p.safetensors").exists()
