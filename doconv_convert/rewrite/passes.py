"""The two torch.fx passes: over-parameterize a graph's convolutions, and fold them back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from doconv_convert.errors import DoconvError
from doconv_convert.nn.composition import compose_kernel
from doconv_convert.nn.factors import SLOTS_SUFFIX, StoredKernel
from doconv_convert.nn.overlay import stored_kernels
from doconv_convert.rewrite.discover import discover
from doconv_convert.rewrite.fold_kernels import (
    Factors,
    Rounding,
    assign_folded,
    layer_factors,
    restore_layers,
    rounded_rows,
    unique,
)
from doconv_convert.rewrite.fx_graph import composition_nodes, parameter_read
from doconv_convert.rewrite.install import (
    factors,
    install,
    is_graph_storage,
    refuse_name_clashes,
    refuse_subclasses,
    register_factors,
)
from doconv_convert.rewrite.options import Options
from doconv_convert.rewrite.sites import Action, Site, decide, site_name


class ToDOConvPass(PassBase):
    """Over-parameterize every eligible convolution of a GraphModule, in place.

    A convolution layer becomes a DOConv layer. A functional convolution on a Parameter gets a
    `compose_kernel` call between the Parameter and everything that reads it, with D as a new Parameter beside
    it. What is computed does not change.

    Arguments are `to_doconv`'s. `sites` is what a caller has planned already for a larger model; by default
    the graph module is planned alone.
    """

    def __init__(
        self,
        d_mul: int | str = "K",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        *,
        pointwise: bool = False,
        max_d_params: int = 16_000_000,
        seed: int = 0,
        composition: str = "kernel",
        sites: Sequence[Site] | None = None,
    ) -> None:
        super().__init__()
        self.options = Options(d_mul, include, exclude, pointwise, max_d_params, seed, composition)
        self.sites = sites

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """PassResult(the same graph module, whether anything was converted).

        Raises UsageError or DoconvError, before the first change, for what `to_doconv` refuses.
        """
        if self.sites is not None:
            return PassResult(graph_module, self._rewrite(graph_module, self.sites))
        discovery = discover(graph_module)
        decide(discovery.sites, self.options)
        planned = [site for site in discovery.sites if site.action is Action.CONVERT]
        for site in planned:
            refuse_name_clashes(site)
        rewritten = [self._rewrite(graph, planned) for region in discovery.regions for graph in region.graphs]
        installed = [install(site, self.options) for site in planned]
        return PassResult(graph_module, any(rewritten + installed))

    def _rewrite(self, gm: fx.GraphModule, sites: Sequence[Site]) -> bool:
        by_parameter = {id(s.parameter): s for s in sites if s.action is Action.CONVERT and s.parameter is not None}
        modified = False
        for node in list(gm.graph.nodes):
            parameter = parameter_read(gm, node)
            if node.op == "call_module":
                parameter = gm.get_submodule(str(node.target))._parameters.get("weight")
            site = by_parameter.get(id(parameter))
            if parameter is None or site is None:
                continue
            if node.op == "call_module":
                modified |= install(site, self.options)
            elif site.d_mul is not None:
                modified |= _insert_composition(gm, node, site, self.options)
            site.rewritten = True
        if modified:
            gm.graph.lint()
            gm.recompile()
        return modified


def _insert_composition(gm: fx.GraphModule, read: fx.Node, site: Site, options: Options) -> bool:
    """Compose between a Parameter and its readers; whether that changed anything."""
    path, _, name = str(read.target).rpartition(".")
    owner, kernel = gm.get_submodule(path), StoredKernel(name, site.group_count)
    if any(user.target is compose_kernel for user in read.users):
        return False
    if not is_graph_storage(owner):
        changed = install(site, options)
        if kernel in stored_kernels(owner):
            return changed  # the attribute itself composes now
    d, extra = factors(site, options)
    if kernel.d_name not in owner._parameters:
        register_factors(owner, kernel, d, extra)
    readers = list(read.users)
    with gm.graph.inserting_after(read):
        prefix = f"{path}." if path else ""
        d_node = gm.graph.get_attr(prefix + kernel.d_name)
    last = d_node
    extra_node = None
    if extra is not None:
        with gm.graph.inserting_after(d_node):
            last = extra_node = gm.graph.get_attr(prefix + kernel.extra_name)
    with gm.graph.inserting_after(last):
        composed = gm.graph.call_function(compose_kernel, (read, d_node, extra_node, kernel.groups))
    for reader in readers:
        reader.replace_input_with(read, composed)
    return True


class FoldPass(PassBase):
    """Fold every DO-Conv of a GraphModule back into an ordinary convolution, in place.

    Kernels are composed in float64, checked against feature composition, and cast once. A plain graph module
    comes back unmodified.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """PassResult(the same graph module, whether anything was folded).

        Raises DoconvError, before the first change, for a kernel that is not finite.
        """
        return PassResult(graph_module, fold_kernels(graph_module)[1])


def fold_kernels(model: nn.Module, check_first: bool = True) -> tuple[dict[str, Rounding], bool]:
    """Fold every over-parameterized kernel of `model`, in layers and in graphs: (how each was rounded, by name; whether
    anything changed). All at once, since a layer and a graph may share a Parameter, and W must be folded a single time.

    `check_first` composes every kernel once more up front, so that an error leaves the model untouched.
    """
    refuse_subclasses(model)
    _refuse_decomposed(model)
    compositions = _compositions(model)
    every = unique([*layer_factors(model), *(composition.factors for composition in compositions)])
    if check_first:
        _check(every)
    rounding = assign_folded(every)
    for composition in compositions:
        composition.remove()
    restored = restore_layers(model)
    for gm in dict.fromkeys(composition.gm for composition in compositions):
        gm.graph.lint()
        gm.recompile()
    return rounding, restored or bool(compositions)


def check_kernels(model: nn.Module) -> None:
    """Raises what folding would, and changes nothing."""
    refuse_subclasses(model)
    _refuse_decomposed(model)
    _check(kernel_factors(model))


def _check(every: Sequence[Factors]) -> None:
    for one in every:
        for _ in rounded_rows(one):
            pass


def kernel_factors(model: nn.Module) -> list[Factors]:
    """The factors of every over-parameterized kernel of `model`, in layers and in graphs, each once."""
    return unique([*layer_factors(model), *(composition.factors for composition in _compositions(model))])


def _compositions(model: nn.Module) -> list[_Composition]:
    graphs = [(path, m) for path, m in model.named_modules() if isinstance(m, fx.GraphModule)]
    return [_Composition(gm, path, node) for path, gm in graphs for node in composition_nodes(gm)]


def _refuse_decomposed(model: nn.Module) -> None:
    """Raises DoconvError for a graph in which torch.export has taken a composition apart: W and D would go on being
    multiplied there, in operations that no longer say what they are."""
    for path, gm in model.named_modules():
        if not isinstance(gm, fx.GraphModule):
            continue
        reads = {str(node.target): node for node in gm.graph.nodes if node.op == "get_attr"}
        for target, node in reads.items():
            owner, _, name = target.rpartition(".")
            if name != "D" and not name.endswith("_D"):
                continue
            kernel = StoredKernel("weight" if name == "D" else name.removesuffix("_D"), 1)
            weight = reads.get(f"{owner}.{kernel.name}".lstrip("."))
            elsewhere = any(user.target is not compose_kernel for user in node.users)
            if weight is not None and elsewhere and _belong_together(gm, weight, node):
                site = site_name(f"{path}.{owner}".strip("."), kernel.name)
                raise DoconvError(
                    f"'{site}': this exported graph composes its kernel in operations of torch, which cannot be "
                    "folded; fold the model before torch.export."
                )


def _belong_together(gm: fx.GraphModule, weight: fx.Node, d: fx.Node) -> bool:
    """Whether two Parameters have the shapes of W's first slots and of its D."""
    w, residual = parameter_read(gm, weight), parameter_read(gm, d)
    if w is None or residual is None or residual.dim() != 3 or w.dim() < 3 or not w.shape[1]:
        return False
    (in_channels, positions, d_mul), per_group = residual.shape, w.shape[1]
    return positions == w.shape[2:].numel() and d_mul >= positions and in_channels % per_group == 0


class _Composition:
    """One `compose_kernel` call of a graph, with the Parameters it reads."""

    def __init__(self, gm: fx.GraphModule, path: str, node: fx.Node) -> None:
        self.gm, self.node = gm, node
        weight, d, extra, groups = (*node.args, *[None] * 4)[:4]
        self.reads = [read for read in (weight, d, extra) if isinstance(read, fx.Node)]
        tensors = [tensor for read in self.reads if (tensor := parameter_read(gm, read)) is not None]
        if len(tensors) < 2 or len(tensors) < len(self.reads) or not isinstance(groups, int):
            raise DoconvError(f"'{node.name}': a compose_kernel call must read Parameters of the graph module itself.")
        owner, _, kernel = f"{path}.{self.reads[0].target}".lstrip(".").rpartition(".")
        name = site_name(owner, kernel.removesuffix(SLOTS_SUFFIX))
        self.factors = Factors(name, tensors[0], tensors[1], (*tensors, None)[2], groups)

    def remove(self) -> None:
        weight = self.reads[0]
        path, _, name = str(weight.target).rpartition(".")
        owner = self.gm.get_submodule(path)
        for read in self.reads[1:]:
            owner._parameters.pop(str(read.target).rpartition(".")[2], None)
        plain_name = name.removesuffix(SLOTS_SUFFIX)
        if plain_name != name:
            renamed = [(plain_name if key == name else key, value) for key, value in owner._parameters.items()]
            owner._parameters.clear()
            owner._parameters.update(renamed)
            weight.target = f"{path}.{plain_name}".lstrip(".")
        self.node.replace_all_uses_with(weight)
        self.gm.graph.erase_node(self.node)
        for read in self.reads[1:]:
            if not read.users:
                self.gm.graph.erase_node(read)
