"""How units are pruned: score them, choose the weakest, cut them out.

A *unit* is what is removed as a whole. An FFN neuron, a KV head with the query heads
that share it, and a channel of the residual stream are slices of several weights. A
block is a whole layer.

This file needs torch and nothing else of this project. You can copy it, and
schedule.py, into a training loop of your own (docs/own-loop.md). Its code knows slices,
and nothing of FFNs or heads.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

Optimizers = list[torch.optim.Optimizer]  # no two of them hold the same parameter


# What a unit is


class Slice(NamedTuple):
    """Where a weight or a bias holds the units of a group.

    They lie along `dim`, one after the other, and all have the same length. A fused
    matrix stacks the units of several matrices. If it stores all gate rows, then all
    up rows, parts is 2.
    """

    name: str  # of the parameter
    dim: int
    parts: int = 1


class UnitGroup(NamedTuple):
    """All units of one kind in one place, such as the neurons of a layer."""

    name: str  # such as "blocks.3.d_ff"
    kind: str  # the name of their width, such as "d_ff"
    width: int  # the number of units
    # Empty for layers: then `name` is a ModuleList, and each of its modules is a unit
    slices: tuple[Slice, ...]


def block_groups(model: nn.Module, blocks: str, units: dict) -> list[UnitGroup]:
    """Return the groups of all layers of a model.

    blocks: the name of the ModuleList that holds the layers.
    units: kind -> its slices, by the names that parameters have in a layer. A bias that
    a layer does not have is left out.

    If model.config does not compute its widths from the weights, update it after each
    prune. Raises ValueError if a layer does not have one of the weights.
    """
    config = model.config  # read once, because a model may compute it at each access
    groups = []
    for i, block in enumerate(model.get_submodule(blocks)):
        layer = f"{blocks}.{i}"
        for kind, slices in units.items():
            found = slices_in_layer(block, layer, kind, slices)
            width = getattr(config, kind)
            groups.append(UnitGroup(f"{layer}.{kind}", kind, width, found))
    return groups


def slices_in_layer(
    block: nn.Module, layer: str, kind: str, slices
) -> tuple[Slice, ...]:
    """Return the slices that this layer has, with their names in the model."""
    parameters = dict(block.named_parameters(remove_duplicate=False))
    found = []
    missing = []
    for where in slices:
        if where.name in parameters:
            found.append(where._replace(name=f"{layer}.{where.name}"))
        elif not where.name.endswith("bias"):
            missing.append(where.name)
    if missing:
        raise ValueError(f"{kind}: {layer} has no parameter {', '.join(missing)}")
    return tuple(found)


# Which units matter least

# Name of a criterion -> the importance of each weight. Its sign does not matter,
# because the scores square it. To add a criterion for weights, add a line.
CRITERIA = {
    # Estimates the effect of the weight on the loss, as in LoSparse (2306.11222)
    "sensitivity": lambda weight, gradient: weight * gradient,
    "magnitude": lambda weight, gradient: weight,
    "random": None,  # Pruner.score draws one number for each unit, once
}


def unit_scores(model: nn.Module, group: UnitGroup, criterion: str) -> Tensor:
    """Return the score of each unit, (width,).

    A score is the L2 norm of the importances of all weights of the unit. This is the
    score of IDEA Prune, as the reviews of 2503.05920 describe it. A frozen weight has
    no gradient. It counts as if its gradient were 0.

    A criterion can also score neurons as a whole. It needs a name in CRITERIA, and
    three lines before the loop:

        if criterion == "output":  # the norm of what a neuron writes
            down = model.get_parameter(group.slices[-1].name)  # (d_model, width)
            return down.norm(dim=0)
    """
    if not group.slices:
        return layer_scores(model.get_submodule(group.name), criterion)
    sums = []
    for where in group.slices:
        squares = squared_importance(model.get_parameter(where.name), criterion)
        sums.append(per_unit(squares, where, group.width))
    return torch.stack(sums).sum(0).sqrt()


def layer_scores(blocks: nn.ModuleList, criterion: str) -> Tensor:
    """Return the score of each layer, (n_layer,), over all of its weights."""
    sums = []
    for block in blocks:
        total = 0
        for parameter in block.parameters():
            squares = squared_importance(parameter, criterion)
            total = total + gathered(squares.sum())
        sums.append(total)
    return torch.stack(sums).sqrt()


def squared_importance(parameter: nn.Parameter, criterion: str) -> Tensor:
    """Return the squared importance of each weight, in the shape of the parameter."""
    gradient = parameter.grad
    if gradient is None:
        gradient = torch.zeros_like(parameter)
    importance = CRITERIA[criterion](parameter.float(), gradient.float())
    return importance.square()


def per_unit(x: Tensor, where: Slice, width: int) -> Tensor:
    """Return the sum of x over each unit, (width,). x is shaped like the parameter."""
    other_dims = [dim for dim in range(x.dim()) if dim != where.dim]
    if other_dims:  # sum([]) would sum over all dims
        x = x.sum(other_dims)
    x = gathered(x)  # (parts * width * length of a piece,)
    pieces = x.view(where.parts, width, -1)
    return pieces.sum((0, 2))


def gathered(x: Tensor) -> Tensor:
    """Return all of x, even if x is a DTensor that FSDP2 shards over ranks."""
    if hasattr(x, "full_tensor"):
        return x.full_tensor()
    return x


def choose(scores: Tensor, n_keep: int) -> Tensor:
    """Return a boolean mask of the `n_keep` units with the highest scores.

    Of two equal scores, the one with the lower index wins.
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    none = torch.zeros_like(scores, dtype=torch.bool)
    return none.index_fill(0, order[:n_keep], True)


# How units are removed


def keep_units(x: Tensor, where: Slice, keep: Tensor) -> Tensor:
    """Return the part of x that belongs to the units where `keep` is true.

    x is shaped like the parameter, and keep is a boolean mask, (width,). If x is
    sharded, the result is sharded in the same way.
    """
    pieces = where.parts * len(keep)
    length = x.shape[where.dim] // pieces  # of one piece; a head has several rows
    stays = keep.repeat_interleave(length).repeat(where.parts)  # (x.shape[where.dim],)
    indices = stays.nonzero().squeeze(1)
    kept = x.index_select(where.dim, indices)
    if hasattr(x, "placements"):
        return kept.redistribute(placements=x.placements)
    return kept


@torch.no_grad()
def slice_group(
    model: nn.Module, optimizers: Optimizers, group: UnitGroup, keep: Tensor
) -> None:
    """Cut a group down to the units where `keep`, a (width,) boolean mask, is true.

    A smaller parameter replaces the old one everywhere in the model and in its
    optimizer, and has no gradient. The moments are cut, too. So AdamW's next update of
    a weight that stays is the same as without the prune. Muon's momentum is cut as
    well, but its update changes, because it mixes all rows of a matrix.
    """
    for where in group.slices:
        old = model.get_parameter(where.name)
        # Replace the parameter instead of resizing it: if someone still holds a loss,
        # its backward pass expects the old shape.
        new = nn.Parameter(keep_units(old, where, keep), old.requires_grad)
        replace_in_model(model, old, new)
        for optimizer in optimizers:
            replace_in_optimizer(optimizer, old, new)
            move_state(optimizer, old, new, where, keep)


def replace_in_model(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put the new parameter everywhere the old one is: in two places if it is tied."""
    everywhere = model.named_parameters(remove_duplicate=False)
    names = [name for name, parameter in everywhere if parameter is old]
    for name in names:
        module_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_name)
        setattr(module, attribute, new)
        update_sizes(module)


def update_sizes(module: nn.Module) -> None:
    """Set the sizes that print(model) shows."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape


def replace_in_optimizer(
    optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter
) -> None:
    """Put the new parameter in the place of the old one, in the same order."""
    for param_group in optimizer.param_groups:
        parameters = param_group["params"]
        param_group["params"] = [new if p is old else p for p in parameters]


def move_state(
    optimizer: torch.optim.Optimizer,
    old: nn.Parameter,
    new: nn.Parameter,
    where: Slice,
    keep: Tensor,
) -> None:
    """Give the new parameter the state of the old one. Only moments are cut."""
    if old not in optimizer.state:
        return
    state = optimizer.state.pop(old)
    for key, value in state.items():
        is_moment = torch.is_tensor(value) and value.shape == old.shape
        if is_moment:
            state[key] = keep_units(value, where, keep)
    optimizer.state[new] = state


def drop_blocks(
    model: nn.Module,
    optimizers: Optimizers,
    group: UnitGroup,
    keep: Tensor,
    scores: dict,
) -> None:
    """Remove layers from the model and from its optimizer.

    keep: a boolean mask, (n_layer,), false for the layers to remove.

    The later layers move up in the list, and the scores of their groups move with them.
    If layer 4 is removed, layer 5 becomes layer 4: the scores of "blocks.5.d_ff" are
    now those for "blocks.4.d_ff".
    """
    blocks = model.get_submodule(group.name)
    stays = keep.tolist()
    parameters = set(model.parameters())
    for i in reversed(range(len(stays))):  # from the end, because later layers move up
        if not stays[i]:
            del blocks[i]
    # A parameter that a removed layer shares with a layer that stays is not removed
    removed = parameters - set(model.parameters())
    for optimizer in optimizers:
        forget_parameters(optimizer, removed)
    move_scores(scores, group.name, stays)


def forget_parameters(optimizer: torch.optim.Optimizer, removed: set) -> None:
    """Remove these parameters and their state from an optimizer."""
    for param_group in optimizer.param_groups:
        parameters = param_group["params"]
        param_group["params"] = [p for p in parameters if p not in removed]
        # If the optimizer knows names of parameters, they are wrong now
        param_group.pop("param_names", None)
    for parameter in removed:
        optimizer.state.pop(parameter, None)


def move_scores(scores: dict, blocks: str, stays: list[bool]) -> None:
    """Rename the scores of the layers that stay, and drop the scores of the others."""
    new_index = 0
    for old_index, layer_stays in enumerate(stays):
        old_prefix = f"{blocks}.{old_index}."
        new_prefix = f"{blocks}.{new_index}."
        names = [name for name in scores if name.startswith(old_prefix)]
        for name in names:
            score = scores.pop(name)
            if layer_stays:
                scores[new_prefix + name.removeprefix(old_prefix)] = score
        if layer_stays:
            new_index += 1


# Score at each step, prune when it is due


class Pruner:
    """Scores the units of these kinds, and prunes by the scores.

    The model must have a method groups(). from_rank_0(mask) returns the mask of rank 0
    on every rank. If you give optimizers, score() also checks that a prune can cut
    their state, so that a run fails at its start and not at its first prune.
    """

    def __init__(
        self,
        criterion: str,
        beta: float,
        kinds,
        seed: int,
        from_rank_0=None,
        optimizers=(),
    ):
        self.criterion = criterion
        self.beta = beta
        self.kinds = set(kinds)
        self.from_rank_0 = from_rank_0 or (lambda mask: mask)
        self.optimizers = optimizers
        self.generator = torch.Generator().manual_seed(seed)
        self.scores: dict[str, Tensor] = {}  # name of a group -> (width,), float32

    @torch.no_grad()
    def score(self, model: nn.Module) -> None:
        """Update the running averages of the scores: S = beta S + (1 - beta) s.

        Call it after gradients are averaged over micro-batches and ranks, and before
        they are clipped. If any gradient is not finite, no score changes.

        Raises ValueError if check_prunable does.
        """
        groups = [group for group in model.groups() if group.kind in self.kinds]
        check_prunable(model, self.optimizers, groups)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = gathered(nn.utils.get_total_norm(gradients))
        # Stays on the GPU: reading it here would make the CPU wait
        finite = norm.isfinite()
        for group in groups:
            if self.criterion != "random":
                self.average(model, group, finite)
            elif group.name not in self.scores:
                self.draw(model, group)

    def average(self, model: nn.Module, group: UnitGroup, finite: Tensor) -> None:
        """Mix the scores of this step into the running average of a group."""
        new = unit_scores(model, group, self.criterion)
        # No bias correction: it would scale all scores of a group alike, and only their
        # order matters.
        old = self.scores.get(group.name, torch.zeros_like(new))
        mixed = old.lerp(new, 1 - self.beta)
        self.scores[group.name] = torch.where(finite, mixed, old)

    def draw(self, model: nn.Module, group: UnitGroup) -> None:
        """Draw a random score for each unit of a group."""
        device = next(model.parameters()).device
        numbers = torch.rand(group.width, generator=self.generator)
        self.scores[group.name] = numbers.to(device)

    @torch.no_grad()
    def prune(
        self, model: nn.Module, optimizers: Optimizers, kind: str, new_width: int
    ) -> dict:
        """Keep the `new_width` best units in each group of this kind.

        All ranks keep the same units. Call it once for each kind that is due. Nothing
        is scored again between two kinds. A cut parameter has no gradient, so the
        gradients of all others are cleared, too.

        Returns two lists for the log, with an entry for each group: "removed" has the
        old indices of the removed units, and "scores" the quantiles of the scores at 0,
        5, ... and 100%. Raises ValueError before anything is cut.
        """
        groups = [group for group in model.groups() if group.kind == kind]
        if not groups:
            raise ValueError(f"{kind}: the model has no units of this kind")
        check_prunable(model, optimizers, groups)
        for group in groups:
            self.check_scores(group, new_width)
        model.zero_grad()
        record: dict[str, list] = {"removed": [], "scores": []}
        for group in groups:
            scores = self.scores[group.name]
            keep = self.from_rank_0(choose(scores, new_width))
            removed = (~keep).nonzero().squeeze(1)
            quantiles = scores.quantile(torch.linspace(0, 1, 21).to(scores))
            record["removed"].append(removed.tolist())
            record["scores"].append(quantiles.tolist())
            self.scores[group.name] = scores[keep]
            if group.slices:
                slice_group(model, optimizers, group, keep)
            else:
                drop_blocks(model, optimizers, group, keep, self.scores)
        return record

    def check_scores(self, group: UnitGroup, new_width: int) -> None:
        """Raise ValueError if the scores of a group cannot choose the units to keep."""
        scores = self.scores.get(group.name, torch.empty(0))
        width = group.width
        if len(scores) != width or not 0 < new_width <= width:
            problem = f"cannot keep {new_width} of {width} by {len(scores)} scores"
            advice = "is it as wide as planned, and did score() come first?"
            raise ValueError(f"{group.name}: {problem}; {advice}")
        if new_width < width and scores.unique().numel() == 1:
            problem = "all scores are equal; did no gradient reach it?"
            raise ValueError(f"{group.name}: {problem}")


# What cannot be pruned


def check_prunable(
    model: nn.Module, optimizers: Optimizers, groups: list[UnitGroup]
) -> None:
    """Raise ValueError if a prune of these groups would fail halfway or lose something.

    Each of the checks below says what it asks for.
    """
    check_gradients(model)
    for group in groups:
        if not group.slices:
            check_layers(model, group)
    cuts: dict[nn.Parameter, set] = {}  # parameter -> the kind and the dim of each cut
    for group in groups:
        for where in group.slices:
            parameter = model.get_parameter(where.name)
            earlier_cuts = cuts.setdefault(parameter, set())
            check_shape(parameter, where, group)
            check_cut_once(earlier_cuts, where, group)
            check_hooks(parameter, where)
            earlier_cuts.add((group.kind, where.dim))
    for optimizer in optimizers:
        check_state(model, optimizer, cuts)


def check_gradients(model: nn.Module) -> None:
    """Gradients must be dense, because a score needs an entry for each weight."""
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None and gradient.is_sparse:
            raise ValueError(
                f"{name}: its gradient is sparse; build its module with sparse=False"
            )


def check_layers(model: nn.Module, group: UnitGroup) -> None:
    """Only one list may hold the layers: a second would still hold the removed ones."""
    blocks = model.get_submodule(group.name)
    layers = set(blocks)
    for name, module in model.named_modules():
        if module is not blocks and layers & set(module.children()):
            raise ValueError(
                f"{name}: it also holds the layers to prune; keep them in one list only"
            )


def check_shape(parameter: nn.Parameter, where: Slice, group: UnitGroup) -> None:
    """The dim must divide into equal pieces, one for each unit in each part."""
    name, dim, parts = where
    if parameter.shape[dim] % (parts * group.width):
        raise ValueError(
            f"{name}: dim {dim} does not hold {parts} times {group.width} units"
        )


def check_cut_once(earlier_cuts: set, where: Slice, group: UnitGroup) -> None:
    """A weight that two groups share would be cut twice, so only one may list it."""
    if (group.kind, where.dim) in earlier_cuts:
        raise ValueError(
            f"{where.name}: {group.kind} would cut it twice; list a shared weight once"
        )


def check_hooks(parameter: nn.Parameter, where: Slice) -> None:
    """A parameter must have no hooks, because its replacement would not have them."""
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        raise ValueError(
            f"{where.name}: a cut would lose its hooks; do their work in your loop"
        )


def check_state(model: nn.Module, optimizer: torch.optim.Optimizer, cuts: dict) -> None:
    """Each entry of the state must be a number, or a tensor shaped like its weight.

    LBFGS fails because it keeps lists. Adafactor fails because its tensors have other
    shapes.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            is_collection = isinstance(value, (list, tuple, dict))
            has_many_numbers = torch.is_tensor(value) and value.numel() > 1
            is_misshapen = has_many_numbers and value.shape != parameter.shape
            if is_collection or (is_misshapen and parameter in cuts):
                names = {p: name for name, p in model.named_parameters()}
                problem = f"the optimizer's {key!r} cannot be cut; AdamW's can"
                raise ValueError(f"{names.get(parameter)}: {problem}")
