"""The public names: what they are, that each is documented and typed, and that the documentation's examples run."""

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import doconv_convert

NAMES = """
DOConv1d DOConv2d DOConv3d kernel_macs feature_macs cached param_groups check_optimizer lever ToDOConvPass FoldPass plan
to_doconv fold save load export_onnx count_macs prove verify rehearse DoconvError UsageError __version__
"""
OBJECTS = {name: getattr(doconv_convert, name) for name in doconv_convert.__all__ if name != "__version__"}
FUNCTIONS = {name: one for name, one in OBJECTS.items() if inspect.isfunction(one)}
# A docstring may send the reader to another's arguments.
SAME_ARGUMENTS = {"plan": "to_doconv", "feature_macs": "kernel_macs"}
# What every argument is, said once: K, C_in and g are the paper's letters for these.
LETTERS = {"in_channels": "C_in", "out_channels": "C_out", "groups": "/g", "d_mul": "D_mul"}


def modules() -> list[ModuleType]:
    found = pkgutil.walk_packages(doconv_convert.__path__, "doconv_convert.")
    return [importlib.import_module(one.name) for one in found if "__main__" not in one.name]


def undocumented(name: str, function: object) -> list[str]:
    """The arguments of a function that neither its docstring nor the one it refers to speaks of."""
    told = inspect.getdoc(function) or ""
    if name in SAME_ARGUMENTS:
        assert f"`{SAME_ARGUMENTS[name]}`'s" in told
        told += inspect.getdoc(FUNCTIONS[SAME_ARGUMENTS[name]]) or ""
    arguments = inspect.signature(function).parameters  # type: ignore[arg-type]
    return [one for one in arguments if one not in told and LETTERS.get(one, one) not in told]


def test_the_public_names() -> None:
    assert doconv_convert.__all__ == NAMES.split()
    assert set(doconv_convert.__all__) <= set(dir(doconv_convert))
    with pytest.raises(AttributeError, match="'convert'"):
        doconv_convert.convert  # noqa: B018


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_documented_and_typed(name: str) -> None:
    function = FUNCTIONS[name]
    assert undocumented(name, function) == []
    signature = inspect.signature(function)
    typed = [one.annotation for one in signature.parameters.values()] + [signature.return_annotation]
    assert inspect.Signature.empty not in typed


@pytest.mark.parametrize("name", sorted(set(OBJECTS) - set(FUNCTIONS)))
def test_classes_and_their_methods_are_documented(name: str) -> None:
    own = {key: value for key, value in vars(OBJECTS[name]).items() if inspect.isfunction(value)}
    assert OBJECTS[name].__doc__
    assert [key for key, value in own.items() if not key.startswith("_") and not value.__doc__] == []


def test_what_can_fail_says_how() -> None:
    cannot_fail = {"kernel_macs", "feature_macs", "rehearse"}
    silent = {name for name, function in FUNCTIONS.items() if "Raises" not in (function.__doc__ or "")}
    assert silent == cannot_fail


def test_an_argument_without_a_word_is_seen() -> None:
    def convert(model: object, depth: int) -> None:
        """Convert `model`."""

    assert undocumented("convert", convert) == ["depth"]


def test_the_docstrings_examples_run() -> None:
    attempted = 0
    for module in modules():
        result = doctest.testmod(module)
        assert result.failed == 0, module.__name__
        attempted += result.attempted
    assert attempted > 25
