"""How units are pruned: score them, choose the weakest, slice them out of weights and optimizer.

Units come in groups (`model.UnitGroup`). A group lists the weights that its units are slices of, or
names the list of blocks. So what scores, chooses and slices does not know what an FFN or a head is.
Read from top to bottom: score, choose, slice, then the Pruner, which does all three.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn as nn
from torch import Tensor

from model import GPT, UnitGroup

Optimizers = list[torch.optim.Optimizer]  # no two hold the same parameter


def sensitivity(weight: Tensor, gradient: Tensor) -> Tensor:
    """To first order, how much the loss changes if this weight becomes zero, up to the sign
    (LoSparse, 2306.11222)."""
    return weight * gradient


def magnitude(weight: Tensor, gradient: Tensor) -> Tensor:
    """How large the weight is, whatever its gradient."""
    return weight


# The importance of single weights. To add a criterion of this sort, write such a function and name
# it in this dict. Signs do not matter: importances are squared.
ELEMENTWISE = {"sensitivity": sensitivity, "magnitude": magnitude}
# `random` scores whole units. To add such a criterion, name it here, and have Pruner.score set
# self.scores[group.name], (width,): the units with the highest numbers stay.
CRITERIA = (*ELEMENTWISE, "random")


def per_unit(x: Tensor, dim: int, width: int) -> Tensor:
    """Sum x, of the shape of one of the group's weights, over the slice of each unit: (width,)."""
    x = x.sum(1 - dim) if x.dim() == 2 else x  # (x.shape[dim],)
    return x.view(width, -1).sum(1)


def unit_scores(model: GPT, group: UnitGroup, criterion: str) -> Tensor:
    """(width,): for each unit the L2 norm of the importances of its weights (IDEA Prune,
    2503.05920; that it is this norm, its published reviews say)."""

    def squares(p: nn.Parameter) -> Tensor:
        return ELEMENTWISE[criterion](p, p.grad).square()

    if group.slices is None:
        blocks = model.get_submodule(group.name)
        sums = [sum(squares(p).sum() for p in block.parameters()) for block in blocks]
        return torch.stack(sums).sqrt()
    weights = [(model.get_parameter(name), dim) for name, dim in group.slices]
    sums = [per_unit(squares(p), dim, group.width) for p, dim in weights]
    return torch.stack(sums).sum(0).sqrt()


def choose(scores: Tensor, n_keep: int) -> Tensor:
    """A boolean mask of the `n_keep` units with the highest scores. Ties go to the lower index."""
    best = torch.sort(scores, descending=True, stable=True).indices[:n_keep]
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[best] = True
    return mask


@torch.no_grad()
def slice_group(model: GPT, optimizers: Optimizers, group: UnitGroup, keep: Tensor) -> None:
    """Cut a group down to the units where `keep`, a (width,) boolean mask, is true.

    A smaller parameter replaces the old one wherever the model and its optimizer hold it. What the
    optimizer keeps of each weight (AdamW: two moments, Muon: one) is cut in the same way. The step
    count stays. Given the same gradient, AdamW updates the weights that stay as if nothing had been
    pruned. Muon's update depends on the whole matrix. Old gradients are dropped.
    """
    for name, dim in group.slices:
        old = model.get_parameter(name)
        rows_per_unit = old.shape[dim] // group.width  # or columns; more than one for a head
        index = keep.repeat_interleave(rows_per_unit).nonzero().squeeze(1)
        new = nn.Parameter(old.index_select(dim, index))
        for module in model.modules():
            for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if parameter is old:  # in two modules, if it is tied
                    setattr(module, key, new)
                    if isinstance(module, nn.Linear):  # so that print(model) is right
                        module.out_features, module.in_features = new.shape
                    elif isinstance(module, nn.Embedding):
                        module.num_embeddings, module.embedding_dim = new.shape
        for optimizer in optimizers:
            for param_group in optimizer.param_groups:
                param_group["params"] = [new if p is old else p for p in param_group["params"]]
            if old in optimizer.state:
                optimizer.state[new] = {  # the only other entry is the step count
                    key: value.index_select(dim, index) if value.shape == old.shape else value
                    for key, value in optimizer.state.pop(old).items()
                }


def drop_blocks(
    model: GPT, optimizers: Optimizers, group: UnitGroup, keep: Tensor
) -> dict[str, str]:
    """Remove whole layers. The others move up in the list, so that "blocks.5.d_ff" may become
    "blocks.4.d_ff": returns old name -> new name, of all groups that are left."""
    blocks = model.get_submodule(group.name)
    removed = (~keep).nonzero().squeeze(1).tolist()
    within = tuple(f"{group.name}.{i}." for i in removed)
    # Names, before the cut, of the groups that stay; groups() keeps their order
    left = [g.name for g in model.groups() if not g.name.startswith(within)]
    gone = {p for i in removed for p in blocks[i].parameters()}
    for optimizer in optimizers:
        for param_group in optimizer.param_groups:
            param_group["params"] = [p for p in param_group["params"] if p not in gone]
        for p in gone & set(optimizer.state):
            del optimizer.state[p]
    for i in reversed(removed):
        del blocks[i]
    return dict(zip(left, (g.name for g in model.groups())))


class Pruner:
    """Keeps the scores of a run's units and prunes by them.

    kinds: the kinds of unit that the run prunes. agree: gives every rank the mask of the first one,
    so that all prune the same units.
    """

    def __init__(
        self,
        criterion: str,
        beta: float,
        kinds: Iterable[str],
        seed: int,
        agree: Callable[[Tensor], Tensor] = lambda mask: mask,
    ):
        self.criterion, self.beta, self.kinds, self.agree = criterion, beta, set(kinds), agree
        self.generator = torch.Generator().manual_seed(seed)
        self.scores: dict[str, Tensor] = {}  # group name -> (width,) float32

    @torch.no_grad()
    def score(self, model: GPT) -> None:
        """Update the scores by those of this step: S = beta S + (1 - beta) s.

        Call it when `weight.grad` is the gradient of the mean loss over all micro-batches and
        ranks, before it is clipped: clipping scales it by a different factor each time. `random`
        draws one number for each unit, once.
        """
        for group in [group for group in model.groups() if group.kind in self.kinds]:
            if self.criterion != "random":
                s = unit_scores(model, group, self.criterion)
                average = self.scores.setdefault(group.name, torch.zeros_like(s))
                average.lerp_(s, 1 - self.beta)  # from 0: all too small, by the same factor
            elif group.name not in self.scores:
                numbers = torch.rand(group.width, generator=self.generator)
                self.scores[group.name] = numbers.to(next(model.parameters()).device)

    @torch.no_grad()
    def prune(
        self, model: GPT, optimizers: Optimizers, kind: str, new_width: int
    ) -> dict[str, list[list]]:
        """Keep the `new_width` best units in each group of this kind, the same ones on every rank.

        Returns a record for the log, two lists with an entry for each group: "removed" has the
        units that went, by their index before this prune, "scores" the minimum, the quartiles and
        the maximum of the group's scores.
        """
        record: dict[str, list[list]] = {"removed": [], "scores": []}
        for group in [group for group in model.groups() if group.kind == kind]:
            scores = self.scores[group.name]
            keep = self.agree(choose(scores, new_width))
            record["removed"].append((~keep).nonzero().squeeze(1).tolist())
            record["scores"].append(scores.quantile(torch.linspace(0, 1, 5).to(scores)).tolist())
            self.scores[group.name] = scores[keep]
            if group.slices is None:
                names = drop_blocks(model, optimizers, group, keep)
                self.scores = {names[old]: s for old, s in self.scores.items() if old in names}
            else:
                slice_group(model, optimizers, group, keep)
        return record
