"""Which units go, and how: score, choose, slice.

A group (see `model.Group`) has `name`, `kind`, `width` and `members`, pairs of a module name and
the dim of that module's weight along which the group's `width` units lie, `size // width` slices
each. Nothing here knows what an FFN or a head is.
"""

import torch
import torch.nn as nn
from torch import Tensor

# --------------------------------------------------------------------------------------------------
# Score
# --------------------------------------------------------------------------------------------------


def per_unit(x: Tensor, dim: int, width: int) -> Tensor:
    """Sum a matrix shaped like a member's weight over all that belongs to each unit: (width,)."""
    return x.sum(1 - dim).view(width, -1).sum(1)


def sensitivity(weights, members, width, inputs, generator) -> Tensor:
    """s_j = sqrt(sum over the unit's weights of (w dL/dw)^2).

    |w dL/dw| is the first-order change of the loss if w alone were zero (LoSparse, 2306.11222);
    the L2 norm over the unit's slices makes it one number per unit (IDEA Prune, as its reviews
    report it).
    """
    parts = [per_unit((w * w.grad).square(), dim, width) for w, (_, dim) in zip(weights, members)]
    return torch.stack(parts).sum(0).sqrt()


def activation(weights, members, width, inputs, generator) -> Tensor:
    """Root mean square of the unit's activation times the norm of the columns that read it."""
    down, (_, dim) = weights[-1], members[-1]
    return per_unit(down.square() * inputs, dim, width).sqrt()


def magnitude(weights, members, width, inputs, generator) -> Tensor:
    """The L2 norm of the unit's weights."""
    parts = [per_unit(w.square(), dim, width) for w, (_, dim) in zip(weights, members)]
    return torch.stack(parts).sum(0).sqrt()


def random(weights, members, width, inputs, generator) -> Tensor:
    """No knowledge at all: what any criterion has to beat."""
    return torch.rand(width, generator=generator).to(weights[0].device)


CRITERIA = {f.__name__: f for f in (sensitivity, activation, magnitude, random)}


@torch.no_grad()
def update_scores(
    scores: dict[str, Tensor],
    model: nn.Module,
    groups: list,
    criterion: str,
    beta: float,
    inputs: dict[str, Tensor],
    generator: torch.Generator,
) -> None:
    """Smooth this step's score into the running one, S <- beta S + (1 - beta) s, for every group.

    Call it after the backward pass and before clipping, when `w.grad` is the gradient of the mean
    loss over all micro-batches and ranks. scores: group name -> (width,) float32, changed in
    place. inputs: group name -> mean square of each input of the group's last member, from
    `watch_inputs`; only `activation` reads it.
    """
    for group in groups:
        weights = [model.get_submodule(name).weight for name, _ in group.members]
        s = CRITERIA[criterion](
            weights, group.members, group.width, inputs.get(group.name), generator
        ).float()
        scores.setdefault(group.name, torch.zeros_like(s)).lerp_(s, 1 - beta)


def watch_inputs(model: nn.Module, groups: list) -> tuple[dict[str, Tensor], list]:
    """Sum the squares of what each group's last member reads, over the training batches to come.

    Returns group name -> (inputs of that module,) float32, and the hooks to `remove()`. The caller
    divides by the number of tokens and sets the sums back to zero.
    """
    sums, hooks = {}, []
    for group in groups:
        reader = model.get_submodule(group.members[-1][0])
        total = torch.zeros(reader.weight.shape[1], device=reader.weight.device)

        def add(module: nn.Module, args: tuple[Tensor], total: Tensor = total) -> None:
            if module.training:
                total.add_(args[0].detach().float().square().sum((0, 1)))  # (B, T, inputs)

        sums[group.name] = total
        hooks.append(reader.register_forward_pre_hook(add))
    return sums, hooks


# --------------------------------------------------------------------------------------------------
# Choose
# --------------------------------------------------------------------------------------------------


def choose(
    scores: list[Tensor], width: int, scope: str, round_to: int = 1, floor: int = 1
) -> list[Tensor]:
    """Which units survive: one boolean mask per group, of the scores' shape.

    scope "layer": the `width` best of every group. scope "global": the best across groups, `width`
    of them on average, in blocks of `round_to` units and at least `floor` units in each group.
    Ties go to the lower index.
    """
    order = [torch.sort(s, descending=True, stable=True).indices for s in scores]
    widths = [width] * len(scores)
    if scope == "global":
        widths = _global_widths([s[o] for s, o in zip(scores, order)], width, round_to, floor)
    masks = []
    for s, o, n in zip(scores, order, widths):
        mask = torch.zeros_like(s, dtype=torch.bool)
        mask[o[:n]] = True
        masks.append(mask)
    return masks


def _global_widths(best_first: list[Tensor], width: int, round_to: int, floor: int) -> list[int]:
    """Share `len(best_first) * width` units out: the strongest blocks win, whatever their group.

    Blocks of a group are taken best first, so what a group gets is always its best units. Like
    units, blocks are compared by the L2 norm of their scores.
    """
    floor_blocks = -(-floor // round_to)
    candidates = []  # (-strength, group, block): in order, the best comes first, ties by position
    for g, s in enumerate(best_first):
        n_blocks = len(s) // round_to
        blocks = s[: n_blocks * round_to].view(n_blocks, round_to).double().norm(dim=1).tolist()
        candidates += [(-b, g, i) for i, b in enumerate(blocks) if i >= floor_blocks]
    n_free = len(best_first) * (width // round_to - floor_blocks)
    widths = [floor_blocks * round_to] * len(best_first)
    for _, g, _ in sorted(candidates)[:n_free]:
        widths[g] += round_to
    return widths


# --------------------------------------------------------------------------------------------------
# Slice
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def slice_group(model: nn.Module, optimizer: torch.optim.Optimizer, group, keep: Tensor) -> None:
    """Cut a group down to the units where `keep`, a (width,) boolean mask, is true.

    The new, smaller parameter takes the old one's place in its module and in the optimizer's
    parameter group; its AdamW moments are sliced with it and its step count is kept, so the next
    update of a surviving weight is the one it would have had.
    """
    for name, dim in group.members:
        module = model.get_submodule(name)
        old = module.weight
        index = keep.repeat_interleave(old.shape[dim] // group.width).nonzero().squeeze(1)
        new = nn.Parameter(old.index_select(dim, index))
        module.weight = new
        setattr(module, "in_features" if dim else "out_features", len(index))
        for param_group in optimizer.param_groups:
            param_group["params"] = [new if p is old else p for p in param_group["params"]]
        if old in optimizer.state:
            optimizer.state[new] = {
                key: value.index_select(dim, index) if value.shape == old.shape else value
                for key, value in optimizer.state.pop(old).items()
            }


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    """Our own invariant: the optimizer holds `count` of the model's parameters (all, unless ranks
    share them out), none twice, none dead, and moments of their shapes."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == count
    assert {id(p) for p in held} <= {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.state} <= {id(p) for p in held}
    for parameter, state in optimizer.state.items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert state[key].shape == parameter.shape, (key, state[key].shape, parameter.shape)


def prune(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scores: dict[str, Tensor],
    kind: str,
    width: int,
    scope: str,
    round_to: int,
    floor: int,
    agree=lambda mask: mask,
) -> dict[str, list[list]]:
    """Choose and slice: leave `width` units in each group of this kind (on average, if scope is
    global).

    The scores are cut with the units. `agree(mask)` returns the mask of rank 0 on every rank.
    Returns for each group, in the order of layers: `removed`, which of the units that it had went,
    counted from 0, and `scores`, least, quartiles and most of those that they were judged by.
    """
    cuts: dict[str, list[list]] = {"removed": [], "scores": []}
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    groups = [g for g in model.groups() if g.kind == kind]
    masks = choose([scores[g.name] for g in groups], width, scope, round_to, floor)
    for group, mask in zip(groups, masks):
        mask = agree(mask)
        slice_group(model, optimizer, group, mask)
        judged = scores[group.name]
        cuts["removed"].append((~mask).nonzero().squeeze(1).tolist())
        cuts["scores"].append(judged.quantile(torch.linspace(0, 1, 5).to(judged)).tolist())
        scores[group.name] = judged[mask]
    check_optimizer(model, optimizer, count)
    return cuts
