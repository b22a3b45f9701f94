"""docs/published_macs.md: complete, made from its data, and made of counts that can be made again."""

import importlib.util
import json
import sys
from types import ModuleType

import pytest
from support_cli import ROOT

RESULTS = json.loads((ROOT / "docs" / "data" / "published_macs.json").read_text())


def script(folder: str, name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_every_published_figure_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    published = script("benchmarks/evidence", "published_macs", monkeypatch).published()
    assert len(published) >= 166
    assert {f"{name} {weights}": figure for name, weights, figure in published} == {
        key: row["published"] for key, row in RESULTS.items()
    }


def test_the_page_is_that_of_the_data_and_explains_every_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = script("docs/make", "published_macs_table", monkeypatch).rendered
    assert (ROOT / "docs" / "published_macs.md").read_text() == rendered(RESULTS)
    for key in ("alexnet IMAGENET1K_V1", "fasterrcnn_resnet50_fpn COCO_V1"):
        wrong = {**RESULTS, key: {**RESULTS[key], "macs": RESULTS[key]["macs"] + 10**6}}
        with pytest.raises(AssertionError, match=key.split()[0]):
            rendered(wrong)


@pytest.mark.zoo
@pytest.mark.parametrize("key", ["squeezenet1_1 IMAGENET1K_V1", "regnet_y_400mf IMAGENET1K_V1", "raft_small C_T_V1"])
@pytest.mark.filterwarnings("ignore")
def test_a_figure_made_again(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, weights = key.split()
    made = script("benchmarks/evidence", "published_macs", monkeypatch).measure(name, weights, None)
    assert made == {field: RESULTS[key][field] for field in made}
