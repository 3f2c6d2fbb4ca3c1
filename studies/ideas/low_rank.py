"""FFN matrices of low rank: python -m studies.ideas.low_rank RANK MERGE CONFIG [...]

As train.py, but each FFN matrix is a product of two with RANK between them. After the part MERGE of
the run, from 0 to 1, the products become usual matrices; 1: they never do. The run prints the
parameters and FLOPs of a run with usual matrices. --resume is refused.
"""

import sys

import torch
import torch.nn as nn

import train
from prune import check_optimizers
from run import UserError
from tools import command


class LowRank(nn.Module):
    """x -> outer inner x."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.inner = nn.Linear(linear.in_features, rank, bias=False)
        self.outer = nn.Linear(rank, linear.out_features, bias=False)
        std = (linear.weight.std().item() / rank**0.5) ** 0.5  # the product has that of `linear`
        for factor in (self.inner, self.outer):
            nn.init.normal_(factor.weight, std=std)

    @property
    def weight(self) -> torch.Tensor:
        """Of the usual matrix, which tells the width."""
        return self.outer.weight @ self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(x))


class Merge:
    def __init__(self, model, optimizers, at: int):
        self.model, self.optimizers, self.at, self.step = model, optimizers, at, 0

    def after_step(self, *_) -> None:
        self.step += 1

    @torch.no_grad()
    def before_forward(self, *_) -> None:
        if self.step != self.at or not self.model.training:
            return
        self.at = -1  # once
        for block in self.model.blocks:
            for name, product in list(block.ffn.named_children()):
                usual = nn.Linear(*product.weight.shape[::-1], bias=False)
                usual.weight.copy_(product.weight)
                setattr(block.ffn, name, usual)
                merged = {product.inner.weight, product.outer.weight}
                for optimizer in self.optimizers:
                    for group in optimizer.param_groups:
                        if merged & set(group["params"]):
                            left = [p for p in group["params"] if p not in merged]
                            group["params"] = [*left, usual.weight]
                    for p in merged:
                        optimizer.state.pop(p, None)
        check_optimizers(self.model, self.optimizers)


@command
def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) < 3 or "--resume" in argv:
        raise UserError("usage: studies.ideas.low_rank RANK MERGE CONFIG [...], no --resume")
    rank, merge = int(argv[0]), float(argv[1])
    make = train.make_optimizers

    def make_optimizers(model, c, dtype):
        for block in model.blocks:
            for name, linear in list(block.ffn.named_children()):
                setattr(block.ffn, name, LowRank(linear, rank))
        optimizers = make(model, c, dtype)
        if merge < 1:
            merger = Merge(model, optimizers, round(merge * c.max_steps))
            model.register_forward_pre_hook(merger.before_forward)
            optimizers[0].register_step_post_hook(merger.after_step)
        print(f"low rank: {sum(p.numel() for p in model.parameters()):,} parameters")
        return optimizers

    train.make_optimizers = make_optimizers
    return train.main(argv[2:])


if __name__ == "__main__":
    sys.exit(main())
