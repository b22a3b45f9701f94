"""The recipe: data about a model's kernels, told by the model or by a state dict's keys, never permission."""

import pytest
import torch
from support import build_model
from support_cli import trained_sample
from torch import nn

from doconv_convert import to_doconv
from doconv_convert.artifacts.checkpoints.recipe import (
    Recipe,
    RecipeSite,
    apply_recipe,
    may_be_factor,
    recipe_sites,
    sites_from_keys,
)
from doconv_convert.artifacts.sources.source import Source
from doconv_convert.errors import DoconvError, UsageError
from doconv_convert.rewrite.options import Options


def test_a_recipe_reads_back_as_it_was_written() -> None:
    sites = (RecipeSite("a.b", "weight", 4, 12), RecipeSite("c", "kernel", 1, None, overlay=True))
    recipe = Recipe(sites, Source("timm:resnet18", {"num_classes": 3}), {"x": "y"}, ("a.b.weight",), "0.0.1")
    assert Recipe.parse(recipe.dump(), "file") == recipe
    assert Recipe.parse(Recipe(()).dump(), "file") == Recipe(())


def test_a_model_tells_its_sites() -> None:
    assert recipe_sites(trained_sample("functional")) == (
        RecipeSite("stem", "weight", 1, 9, overlay=True),
        RecipeSite("scales", "kernel", 1, 9, overlay=True),
        RecipeSite("last", "weight", 1, 9),
    )
    assert recipe_sites(build_model("functional")) == ()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "does not say what model it holds"),
        (Source("a.b:make"), "names 'a.b:make'; its code is only run if you name it: `model` a.b:make"),
        (Source("net.py:make"), "`model` net.py:make"),
        (Source("torchvision:resnet0"), "no model 'resnet0'; did you mean"),
        (Source("torchvision:resnet18", {"norm_layer": "x"}), "'norm_layer', which a recipe may not set"),
    ],
)
def test_only_known_sources_with_known_arguments_are_trusted(source: Source | None, message: str) -> None:
    with pytest.raises(DoconvError, match=message):
        Recipe((), source).trusted_source("file")


def test_a_known_source_is_trusted() -> None:
    source = Source("torchvision:resnet18", {"num_classes": 3})
    assert Recipe((), source).trusted_source("file") == source


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a.D", True),
        ("a.weight_extra", True),
        ("a.kernel_D", True),
        ("a.kernel_extra", True),
        ("b.D", False),
        ("D", False),
        ("a.D2", False),
        ("a.weight", False),
        ("a.xD", False),
    ],
)
def test_factors_are_told_by_the_kernel_beside_them(key: str, expected: bool) -> None:
    assert may_be_factor(key, {"a.weight", "a.kernel", "b.bias"}) is expected
    assert may_be_factor("D", {"weight"})


@pytest.mark.parametrize("name", ["residual", "grouped", "functional", "tied", "control_flow"])
@pytest.mark.parametrize("options", [{}, {"d_mul": "2K"}, {"pointwise": True}])
def test_keys_tell_what_the_model_tells(name: str, options: dict[str, object]) -> None:
    model = to_doconv(build_model(name), **options)  # type: ignore[arg-type]
    told = sites_from_keys(build_model(name), model.state_dict(), Options(), "file")
    assert {(site.owner, site.kernel, site.groups, site.d_mul) for site in told} == {
        (site.owner, site.kernel, site.groups, site.d_mul) for site in recipe_sites(model)
    }
    apply_recipe(rebuilt := build_model(name), told, model.state_dict(), "file")
    assert rebuilt.state_dict().keys() == model.state_dict().keys()


def test_a_glob_without_a_match_is_wrong_usage() -> None:
    state = to_doconv(build_model("residual")).state_dict()
    with pytest.raises(UsageError, match="exclude 'absent' matches no convolution"):
        sites_from_keys(build_model("residual"), state, Options(exclude=["absent"]), "file")


def test_a_refused_recipe_leaves_the_model_alone() -> None:
    model, state = build_model("residual"), to_doconv(build_model("residual")).state_dict()
    sites = (*recipe_sites(to_doconv(build_model("residual"))), RecipeSite("absent", "weight", 1, 9))
    with pytest.raises(DoconvError, match="'absent' is not in ResidualNet"):
        apply_recipe(model, sites, state, "file")
    assert recipe_sites(model) == ()
    assert type(model.get_submodule("stem.0")) is nn.Conv2d


def test_a_model_with_an_attribute_of_ds_name_is_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 2, 3, 3))
            self.D = 3

    state = {"weight": torch.ones(4, 2, 3, 3), "D": torch.zeros(2, 9, 9)}
    with pytest.raises(DoconvError, match="already has an attribute 'D'"):
        apply_recipe(Own(), (RecipeSite("", "weight", 1, 9, overlay=True),), state, "file")
