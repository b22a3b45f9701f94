"""What training made of each kernel: the figures of layers, graphs and foreign units, by their definitions."""

import pytest
import torch
from support import build_model, sample_source, varied_images
from support_cli import trained_sample
from torch import fx, nn

from doconv_convert import ToDOConvPass, to_doconv
from doconv_convert.artifacts.sources.source import build, parse_source
from doconv_convert.rewrite.convert import copy_model
from doconv_convert.rewrite.fold import fold_in_place
from doconv_convert.rewrite.foreign.authors import install_authors
from doconv_convert.rewrite.layer_stats import Layer, trained_layers


def described(model: nn.Module, example: torch.Tensor | None = None) -> dict[str, Layer]:
    folded = fold_in_place(copy_model(model), check_first=False).model
    samples = 1 if example is None else len(example)
    return {layer.name: layer for layer in trained_layers(model, folded, example, samples)}


def test_an_untrained_model_has_not_moved() -> None:
    layers = described(to_doconv(build_model("residual")), varied_images(2, 3, 32, 32))
    with_d = [layer for layer in layers.values() if layer.d_mul is not None]
    assert len(with_d) > 2
    assert all(layer.d_moved == layer.kernel_changed == 0.0 for layer in with_d)


def test_macs_are_those_of_one_sample() -> None:
    model = trained_sample("grouped")
    one, three = (described(model, varied_images(count, 3, 32, 32)) for count in (1, 3))
    assert one == three
    assert all(layer.macs for layer in one.values())
    assert any(layer.d_moved for layer in one.values())


@pytest.mark.parametrize("name", ["functional", "tied", "control_flow"])
def test_every_kernel_with_a_d_is_told_with_and_without_a_run(name: str) -> None:
    model = trained_sample(name)
    folded = fold_in_place(copy_model(model), check_first=False).folded
    for example in (None, varied_images(2, 3, 32, 32)):
        layers = described(model, example)
        assert {layer.name for layer in layers.values() if layer.d_moved} == set(folded)
        assert len(layers) >= len(folded) > 0


def test_a_graph_that_composes_has_the_same_figures() -> None:
    source = build(parse_source(sample_source("functional"))).eval()
    model = ToDOConvPass()(fx.symbolic_trace(source)).graph_module
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("D"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    parameters = {key: parameter.detach() for key, parameter in model.named_parameters()}
    layers = [layer for layer in described(model).values() if layer.d_moved is not None]
    assert layers
    for layer in layers:
        d = next(parameters[key] for key in (f"{layer.name}.D", f"{layer.name}_D") if key in parameters)
        identity = torch.eye(*d.shape[1:]).expand_as(d)
        assert layer.d_moved == pytest.approx(float(d.norm() / identity.norm()), rel=1e-6)


def test_a_foreign_unit_is_held_against_its_own_identity() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3)).eval()
    w, d = torch.randn(6, 4, 18), 0.1 * torch.randn(4, 9, 18)
    identity = torch.eye(9).repeat(1, 2).expand(4, 9, 18).contiguous()  # theirs at D_mul = 2K is [I | I]
    install_authors(model[0], "weight", w, d, identity, None, torch.tensor([3.0]))
    layer = described(model)["0"]
    start = torch.einsum("cps,ocs->ocp", identity, w)
    moved = torch.einsum("cps,ocs->ocp", d, w)
    assert layer.d_moved == pytest.approx(float(d.norm() / identity.norm()), rel=1e-6)
    assert layer.kernel_changed == pytest.approx(float(moved.norm() / start.norm()), rel=1e-5)
    assert (layer.d_mul, layer.added_parameters, layer.kernel) == (18, d.numel(), [3, 3])
