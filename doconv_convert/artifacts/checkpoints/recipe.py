"""The recipe: which kernels of a model are over-parameterized, and how. Data, never permission to run code."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from torch import Tensor, fx, nn

from doconv_convert.artifacts.sources.source import Source, parse_source
from doconv_convert.errors import DoconvError, UsageError
from doconv_convert.nn.factors import StoredKernel
from doconv_convert.nn.layers import DOCONV_CLASSES
from doconv_convert.nn.overlay import stored_kernels
from doconv_convert.rewrite.discover import discover
from doconv_convert.rewrite.fx_graph import composition_nodes
from doconv_convert.rewrite.install import install, refuse_name_clashes
from doconv_convert.rewrite.options import Options
from doconv_convert.rewrite.passes import ToDOConvPass
from doconv_convert.rewrite.sites import Action, Owner, Site, decide, site_name
from doconv_convert.versions import __version__
from doconv_convert.words import listed

# docs/metadata.md is the format's page.
METADATA_KEY = "doconv_convert"
FORMAT_VERSION = 1
# What a recipe may hand to a torchvision or timm builder: sizes and switches, nothing that names a file.
RECIPE_ARGS = frozenset(
    {"num_classes", "num_keypoints", "in_chans", "width_mult", "depth_mult", "groups", "width_per_group"}
    | {"aux_logits", "aux_loss", "init_weights", "transform_input", "dropout", "drop_rate", "drop_path_rate"}
    | {"stochastic_depth_prob", "image_size", "img_size", "input_size", "global_pool", "output_stride", "progress"}
)


@dataclass(frozen=True)
class RecipeSite:
    """One over-parameterized kernel: its owner's path, its name there, groups and D_mul (None: a 1x1 layer
    without D)."""

    owner: str
    kernel: str
    groups: int
    d_mul: int | None


@dataclass(frozen=True)
class Recipe:
    """What safetensors cannot say about a saved model; JSON under one metadata key.

    `aliases` maps every further name of a shared tensor to the one it is stored under, `channels_last` names
    the tensors that are in that memory format in the model.
    """

    sites: tuple[RecipeSite, ...]
    source: Source | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    channels_last: tuple[str, ...] = ()
    tool_version: str = __version__

    def dump(self) -> str:
        source = self.source and self.source.without_folders().to_json()
        content = {**asdict(self), "format": FORMAT_VERSION, "source": source}
        return json.dumps(content, sort_keys=True)

    @classmethod
    def parse(cls, text: str, path: str) -> Recipe:
        """The inverse of `dump`. Nothing named in the text is opened or imported. Raises DoconvError."""
        try:
            content = json.loads(text)
            if content["format"] != FORMAT_VERSION:
                raise DoconvError(
                    f"'{path}': its recipe has format {content['format']}, expected {FORMAT_VERSION}; "
                    "it was written by another version of doconv-convert: use that one or a newer one."
                )
            source = content["source"]
            return cls(
                tuple(_site(**site) for site in content["sites"]),
                None if source is None else Source(str(source["source"]), dict(source["args"])),
                {str(alias): str(stored) for alias, stored in content["aliases"].items()},
                tuple(map(str, content["channels_last"])),
                str(content["tool_version"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DoconvError(f"'{path}': its recipe cannot be read ({error!r}); the file is damaged.") from error

    def trusted_source(self, path: str) -> Source:
        """The source, if it may be built without the user naming it: torchvision or timm, with known arguments.

        Raises DoconvError that says what to pass instead.
        """
        if self.source is None:
            raise DoconvError(
                f"'{path}' does not say what model it holds; name it with `model` SOURCE (in Python: load(path, "
                "model=...))."
            )
        if self.source.kind not in ("torchvision", "timm"):
            raise DoconvError(
                f"'{path}' names '{self.source.text}'; its code is only run if you name it: `model` "
                f"{self.source.text} (in Python: load(path, model=...))."
            )
        unknown = sorted(self.source.args.keys() - RECIPE_ARGS)
        if unknown:
            raise DoconvError(
                f"'{path}' asks for the model argument '{unknown[0]}', which a recipe may not set; pass `model` "
                f"{self.source.text} `model_args` JSON yourself."
            )
        try:
            return parse_source(self.source.text, self.source.args)
        except UsageError as error:
            raise DoconvError(f"'{path}': {error}") from error


def may_be_factor(key: str, own: Collection[str]) -> bool:
    """Whether a state dict's key could be the D or weight_extra of a kernel of a model with the keys `own`."""
    for suffix in ("D", "weight_extra"):
        if f".{key}".endswith(f".{suffix}") and key.removesuffix(suffix) + "weight" in own:
            return True
    return any(key.endswith(suffix) and key.removesuffix(suffix) in own for suffix in ("_D", "_extra"))


def recipe_sites(model: nn.Module) -> tuple[RecipeSite, ...]:
    """The over-parameterized kernels of a converted model."""
    found = []
    for path, module in model.named_modules():
        for kernel in stored_kernels(module):
            d = module._parameters[kernel.d_name]
            d_mul = None if d is None else int(d.shape[2])
            found.append(RecipeSite(path, kernel.name, kernel.groups, d_mul))
        if type(module) in DOCONV_CLASSES.values() and module.D is None:
            found.append(RecipeSite(path, "weight", int(module.groups), None))
        if isinstance(module, fx.GraphModule):
            found += _graph_sites(module, path)
    return tuple(dict.fromkeys(found))


def _graph_sites(gm: fx.GraphModule, path: str) -> Iterator[RecipeSite]:
    """The kernels that a GraphModule's own graph composes."""
    for node in composition_nodes(gm):
        weight, d, _, groups = node.args
        if isinstance(weight, fx.Node) and isinstance(d, fx.Node) and isinstance(groups, int):
            owner, _, kernel = f"{path}.{weight.target}".lstrip(".").rpartition(".")
            yield RecipeSite(owner, kernel, groups, int(gm.get_parameter(str(d.target)).shape[2]))


def apply_recipe(model: nn.Module, sites: Sequence[RecipeSite], state: Mapping[str, Tensor], path: str) -> None:
    """Make exactly these kernels of a plain model over-parameterized, in place, ready for `state`.

    Raises DoconvError, before the first change, for a site that the model does not have and for one whose D is
    not in the state, or not in its shape.
    """
    owners: dict[int, list[Owner]] = {}
    for owner_path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append(Owner(owner_path, module, name))
    modules = dict(model.named_modules(remove_duplicate=False))
    already = {(one.owner, one.kernel, one.groups) for one in recipe_sites(model) if one.d_mul is not None}
    planned: dict[int, Site] = {}
    for one in sites:
        owner = modules.get(one.owner)
        parameter = None if owner is None else owner._parameters.get(one.kernel)
        if owner is None or parameter is None:
            raise DoconvError(
                f"'{path}': the over-parameterized kernel '{site_name(one.owner, one.kernel)}' is not in "
                f"{type(model).__name__}; name the architecture it was trained with (`model`, `model_args`)."
            )
        _require_factors(one, parameter, state, path)
        if (one.owner, one.kernel, one.groups) in already:
            continue
        site = planned.setdefault(id(parameter), Site(owners[id(parameter)], parameter, {one.groups}))
        site.d_mul = one.d_mul
    for site in planned.values():
        refuse_name_clashes(site)
    rewrite = ToDOConvPass(sites=list(planned.values()))
    for module in modules.values():
        if isinstance(module, fx.GraphModule):  # its graph composes, where another's layers do
            rewrite(module)
    for site in planned.values():
        install(site, Options())


def _require_factors(one: RecipeSite, parameter: Tensor, state: Mapping[str, Tensor], path: str) -> None:
    """Raises DoconvError unless `state` has the site's D and weight_extra in shapes that go with its kernel."""
    name, shape, kernel = site_name(one.owner, one.kernel), parameter.shape, StoredKernel(one.kernel, one.groups)
    if parameter.dim() not in (3, 4, 5) or shape[0] % one.groups:
        raise DoconvError(
            f"'{path}': its recipe gives '{name}' {one.groups} groups, which a kernel of shape {tuple(shape)} cannot "
            "have; it is damaged, or from another architecture (`model`, `model_args`)."
        )
    if one.d_mul is None:
        return
    positions = shape[2:].numel()
    expected = {kernel.d_name: (shape[1] * one.groups, positions, one.d_mul)}
    if one.d_mul > positions:
        expected[kernel.extra_name] = (*shape[:2], one.d_mul - positions)
    for key, wanted in expected.items():
        full = f"{one.owner}.{key}".lstrip(".")
        got = tuple(state[full].shape) if full in state else "none"
        if got != wanted or one.d_mul < positions:
            raise DoconvError(
                f"'{path}': the over-parameterized kernel '{name}' needs '{full}' with shape {wanted}, got {got}; the "
                "file is incomplete or damaged: save it again, or go back to an earlier one."
            )


def _site(owner: str, kernel: str, groups: int, d_mul: int | None, overlay: bool = False) -> RecipeSite:
    """A site as a file gives it (`overlay` is what version 0.1.0 wrote).

    Raises TypeError or ValueError for values of other kinds.
    """
    numbers = [groups] if d_mul is None else [groups, d_mul]
    if not all(type(value) is int and value > 0 for value in numbers):
        raise ValueError(f"groups {groups!r} and d_mul {d_mul!r} of {owner!r} are not positive whole numbers")
    return RecipeSite(str(owner), str(kernel), groups, d_mul)


def sites_from_keys(
    model: nn.Module, state: Mapping[str, Tensor], options: Options, path: str
) -> tuple[RecipeSite, ...]:
    """Which kernels of `model` a state dict without a recipe over-parameterizes, told by its keys and shapes.

    () for a plain state dict. Raises DoconvError where some eligible kernels have a D and others lost theirs:
    a truncated file must not pass for zeros. `options` says what was left out on purpose.
    """
    discovery = discover(model)
    decide(discovery.sites, options)
    by_owner = {(owner.path, owner.kernel): site for site in discovery.sites for owner in site.owners}
    found: dict[tuple[str, str], RecipeSite] = {}
    for owner_path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            d = state.get(f"{owner_path}.{StoredKernel(name, 1).d_name}".lstrip("."))
            if parameter is None or d is None or d.dim() != 3 or parameter.dim() < 3 or not parameter.shape[1]:
                continue
            groups = max(1, d.shape[0] // parameter.shape[1])
            found[owner_path, name] = RecipeSite(owner_path, name, groups, int(d.shape[2]))
    if not found:
        return ()
    kept = {id(by_owner[key]) for key in found if key in by_owner}
    lost = [
        site
        for site in discovery.sites
        if site.action is Action.CONVERT
        and site.d_mul is not None
        and id(site) not in kept
        and f"{site.owners[0].path}.{site.owners[0].kernel}".lstrip(".") in state
    ]
    if lost:
        names = listed([f"'{site.name}'" for site in lost])
        exclude = " ".join(f"`exclude` '{site.name}'" for site in lost)
        include = " ".join(f"`include` '{site_name(*key)}'" for key in found)
        raise DoconvError(
            f"'{path}': {len(found)} kernels have a D, but {len(lost)} have none ({names}); the file may have lost "
            f"them. If they were left out of the conversion, say so: {min(exclude, include, key=len)}"
        )
    # 1x1 layers have no key of their own: those the same conversion would have swapped.
    without_d = [
        RecipeSite(owner.path, owner.kernel, site.group_count, None)
        for site in discovery.sites
        for owner in site.owners[:1]
        if site.action is Action.CONVERT
        and site.d_mul is None
        and id(site) not in kept
        and type(owner.module) in DOCONV_CLASSES
    ]
    return (*found.values(), *without_d)
