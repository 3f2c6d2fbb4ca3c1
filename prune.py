"""How units are pruned: score them, choose the weakest, slice them out of weights and optimizer.

A *unit* is what is removed as a whole: an FFN neuron, a KV head with the query heads that share it,
a channel of the residual stream (these are slices of several weights), or a block, a whole layer.
This file needs torch and nothing else of this project: copy it, and schedule.py, into a training
loop of your own (docs/own-loop.md). Its code knows slices, and nothing of FFNs or heads.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

Optimizers = list[torch.optim.Optimizer]  # no two hold the same parameter


class Slice(NamedTuple):
    """Where the units of a group lie in a weight or bias: along `dim`, one after the other, each of
    the same length. A matrix of all queries, then all keys, then all values holds three such
    sequences, one below another: parts=3."""

    name: str  # of the parameter
    dim: int
    parts: int = 1


class UnitGroup(NamedTuple):
    """All units of one kind in one place, such as neurons of a layer. Their number is its width."""

    name: str  # such as "blocks.3.d_ff"
    kind: str  # the name of their width, such as "d_ff"
    width: int  # how many units
    slices: tuple[Slice, ...]  # () for layers: `name` is a ModuleList, each module of it a unit


def block_groups(model: nn.Module, blocks: str, units: dict) -> list[UnitGroup]:
    """The groups in each layer of a model. blocks: the name of the ModuleList of its layers. units:
    kind -> slices, by their names in a layer. A bias that is not there is left out. Widths are read
    from model.config, which must change with each prune. Raises ValueError for a missing weight."""
    groups, config = [], model.config  # read once: it may be computed
    for i, block in enumerate(model.get_submodule(blocks)):
        has = {name for name, _ in block.named_parameters(remove_duplicate=False)}
        for kind, slices in units.items():
            slices = [s for s in slices if s.name in has or not s.name.endswith("bias")]
            if missing := {s.name for s in slices} - has:
                raise ValueError(f"{kind}: {blocks}.{i} has no parameter {', '.join(missing)}")
            named = tuple(s._replace(name=f"{blocks}.{i}.{s.name}") for s in slices)
            groups.append(UnitGroup(f"{blocks}.{i}.{kind}", kind, getattr(config, kind), named))
    return groups


# Name of a criterion -> the importance of a weight, up to sign. Another is one more line here
CRITERIA = {
    "sensitivity": lambda weight, gradient: weight * gradient,  # of the loss (LoSparse 2306.11222)
    "magnitude": lambda weight, gradient: weight,
    "random": None,  # a number for each unit, drawn once: see Pruner.score
}


def gathered(x: Tensor) -> Tensor:
    """All of x, where it is sharded over ranks (a DTensor of FSDP2)."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def per_unit(x: Tensor, where: Slice, width: int) -> Tensor:
    """Sum x, of the shape of a parameter of the group, over the pieces of each unit: (width,)."""
    others = [dim for dim in range(x.dim()) if dim != where.dim]
    x = gathered(x.sum(others) if others else x)  # (x.shape[dim],); sum([]) would sum all
    return x.view(where.parts, width, -1).sum((0, 2))


def unit_scores(model: nn.Module, group: UnitGroup, criterion: str) -> Tensor:
    """(width,): for each unit the L2 norm of the importances of its weights (IDEA Prune, as the
    reviews of 2503.05920 say). A weight without a gradient (frozen) has gradient 0.

    A criterion may score whole units instead: a name in CRITERIA, and three lines here, such as

        if criterion == "output":  # how much a neuron writes: the norm of its column of `down`
            down = model.get_parameter(group.slices[-1].name)  # (d_model, width)
            return down.norm(dim=0)
    """

    def squares(p: nn.Parameter) -> Tensor:
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        return CRITERIA[criterion](p.float(), gradient.float()).square()

    if not group.slices:
        blocks = model.get_submodule(group.name)
        sums = [sum(gathered(squares(p).sum()) for p in block.parameters()) for block in blocks]
        return torch.stack(sums).sqrt()
    sums = [per_unit(squares(model.get_parameter(s.name)), s, group.width) for s in group.slices]
    return torch.stack(sums).sum(0).sqrt()


def choose(scores: Tensor, n_keep: int) -> Tensor:
    """A boolean mask of the `n_keep` units with the highest scores. Ties go to the lower index."""
    best = torch.sort(scores, descending=True, stable=True).indices[:n_keep]
    return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, best, True)


def keep_units(x: Tensor, where: Slice, keep: Tensor) -> Tensor:
    """x, of the shape of a parameter of the group, without the units that go. Sharded as x is."""
    length = x.shape[where.dim] // (where.parts * len(keep))  # of a piece; more than 1 for a head
    index = keep.repeat_interleave(length).repeat(where.parts).nonzero().squeeze(1)
    kept = x.index_select(where.dim, index)
    return kept.redistribute(placements=x.placements) if hasattr(x, "placements") else kept


@torch.no_grad()
def slice_group(model: nn.Module, optimizers: Optimizers, group: UnitGroup, keep: Tensor) -> None:
    """Cut a group down to the units where `keep`, a (width,) boolean mask, is true. Gradients go.
    A smaller parameter replaces the old one wherever the model and its optimizer hold it. Moments
    are cut, too, so AdamW goes on as if nothing had been pruned (but Muon mixes all rows).
    """
    for where in group.slices:
        old = model.get_parameter(where.name)
        # A new one, as a graph that still lives, of a loss that is kept, knows the old one's shape
        new = nn.Parameter(keep_units(old, where, keep), old.requires_grad)
        everywhere = model.named_parameters(remove_duplicate=False)
        for name in [name for name, p in everywhere if p is old]:  # two, if it is tied
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            setattr(module, attribute, new)
            if isinstance(module, nn.Linear):  # so that print(model) is right
                module.out_features, module.in_features = module.weight.shape
            elif isinstance(module, nn.Embedding):
                module.num_embeddings, module.embedding_dim = module.weight.shape
        for optimizer in optimizers:
            for param_group in optimizer.param_groups:
                param_group["params"] = [new if p is old else p for p in param_group["params"]]
            if old in optimizer.state:  # a step count stays as it is
                state = optimizer.state[new] = optimizer.state.pop(old)
                moments = {k: x for k, x in state.items() if getattr(x, "shape", 0) == old.shape}
                state |= {k: keep_units(x, where, keep) for k, x in moments.items()}


def drop_blocks(
    model: nn.Module, optimizers: Optimizers, group: UnitGroup, keep: Tensor, scores: dict
) -> None:
    """Remove whole layers from the model and its optimizer. The others move up in the list, and so
    do the scores of their groups: without layer 4, "blocks.5.d_ff" becomes "blocks.4.d_ff"."""
    blocks, kept, before = model.get_submodule(group.name), keep.tolist(), set(model.parameters())
    for i in reversed([i for i, stays in enumerate(kept) if not stays]):
        del blocks[i]
    gone = before - set(model.parameters())  # not what a layer shares with one that stays
    for optimizer in optimizers:
        for param_group in optimizer.param_groups:
            param_group["params"] = [p for p in param_group["params"] if p not in gone]
            param_group.pop("param_names", None)  # of named_parameters(): they are others now
        for p in gone & set(optimizer.state):
            del optimizer.state[p]
    for i, stays in enumerate(kept):  # in ascending order: each place is free before it is taken
        was, now = f"{group.name}.{i}.", f"{group.name}.{sum(kept[:i])}."
        for name in [name for name in scores if name.startswith(was)]:
            score = scores.pop(name)
            if stays:
                scores[now + name.removeprefix(was)] = score


class Pruner:
    """Scores units of these kinds, and prunes by these scores, in a model that has groups().
    from_rank_0(mask): the first rank's mask, on every rank. optimizers: for score() to check."""

    def __init__(
        self, criterion: str, beta: float, kinds, seed: int, from_rank_0=None, optimizers=()
    ):
        self.criterion, self.beta, self.kinds = criterion, beta, set(kinds)
        self.from_rank_0, self.optimizers = from_rank_0 or (lambda mask: mask), optimizers
        self.generator = torch.Generator().manual_seed(seed)
        self.scores: dict[str, Tensor] = {}  # group name -> (width,) float32

    @torch.no_grad()
    def score(self, model: nn.Module) -> None:
        """Update the scores by this step's: S = beta S + (1 - beta) s. Raises ValueError
        as check_prunable does.

        Call it when gradients are those of the mean loss over all micro-batches and ranks, before
        these are clipped, by a factor of each step's own. If any is not finite, no score changes.
        """
        groups = [group for group in model.groups() if group.kind in self.kinds]
        check_prunable(model, self.optimizers, groups)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        finite = gathered(nn.utils.get_total_norm(gradients)).isfinite()  # the CPU need not wait
        for group in groups:
            if self.criterion != "random":
                s = unit_scores(model, group, self.criterion)
                # From 0, uncorrected: one factor for all scores of a group, so their order is right
                old = self.scores.get(group.name, torch.zeros_like(s))
                self.scores[group.name] = torch.where(finite, old.lerp(s, 1 - self.beta), old)
            elif group.name not in self.scores:
                numbers = torch.rand(group.width, generator=self.generator)
                self.scores[group.name] = numbers.to(next(model.parameters()).device)

    @torch.no_grad()
    def prune(self, model: nn.Module, optimizers: Optimizers, kind: str, new_width: int) -> dict:
        """Keep the `new_width` best units in each group of this kind, the same ones on every rank.
        Call it for each kind that is due; all are pruned by the scores from before the first cut.
        All gradients go, as those of a cut weight do: half of a step's would mislead an optimizer.

        Returns for the log, for each group: "removed", the old indices of the units that went, and
        "scores", the quantiles of its scores at 0, 5, ... 100%. Raises ValueError before any cut.
        """
        groups = [group for group in model.groups() if group.kind == kind]
        if not groups:
            raise ValueError(f"{kind}: the model has no units of this kind")
        check_prunable(model, optimizers, groups)
        for group in groups:
            n, width = len(self.scores.get(group.name, ())), group.width
            if n != width or not 0 < new_width <= width:
                what = f"{group.name}: cannot keep {new_width} of {width} by {n} scores"
                raise ValueError(f"{what}; is it as wide as planned, and did score() come first?")
            if new_width < width and self.scores[group.name].unique().numel() == 1:
                raise ValueError(f"{group.name}: all scores are equal; did no gradient reach it?")
        model.zero_grad()
        record: dict[str, list] = {"removed": [], "scores": []}
        for group in groups:
            scores = self.scores[group.name]
            keep = self.from_rank_0(choose(scores, new_width))
            record["removed"].append((~keep).nonzero().squeeze(1).tolist())
            record["scores"].append(scores.quantile(torch.linspace(0, 1, 21).to(scores)).tolist())
            self.scores[group.name] = scores[keep]
            if group.slices:
                slice_group(model, optimizers, group, keep)
            else:
                drop_blocks(model, optimizers, group, keep, self.scores)
        return record


def check_prunable(model: nn.Module, optimizers: Optimizers, groups: list[UnitGroup]) -> None:
    """Raises ValueError where slices do not fit or would cut twice, where layers stand in a second
    list, where a weight has hooks or a sparse gradient, and where an optimizer keeps what cannot be
    cut: a list (LBFGS), or a tensor of another shape than its weight (Adafactor)."""
    names, cuts = {p: name for name, p in model.named_parameters()}, {}
    if sparse := [name for p, name in names.items() if p.grad is not None and p.grad.is_sparse]:
        raise ValueError(f"{sparse[0]}: its gradient is sparse; build its module with sparse=False")
    for blocks in (model.get_submodule(group.name) for group in groups if not group.slices):
        for name, m in model.named_modules():
            if m is not blocks and {*m.children()} & {*blocks}:
                raise ValueError(f"{name}: holds layers to prune a second time; let one list do")
    for kind, width, s in [(group.kind, group.width, s) for group in groups for s in group.slices]:
        p = model.get_parameter(s.name)
        if p.shape[s.dim] % (s.parts * width):
            raise ValueError(f"{s.name}: dim {s.dim} does not hold {s.parts} times {width} units")
        if (kind, s.dim) in cuts.setdefault(p, set()):
            raise ValueError(f"{s.name}: {kind} would cut it twice; list a shared weight once")
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            raise ValueError(f"{s.name}: a cut would lose its hooks; do their work in your loop")
        cuts[p].add((kind, s.dim))
    kept = [(p, *entry) for o in optimizers for p in o.state for entry in o.state[p].items()]
    for p, key, x in kept:
        odd = p in cuts and torch.is_tensor(x) and x.numel() > 1 and x.shape != p.shape
        if odd or isinstance(x, (list, tuple, dict)):
            raise ValueError(f"{names.get(p)}: the optimizer's {key!r} cannot be cut; AdamW's can")
