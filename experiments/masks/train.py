"""Single weights instead of neurons: python -m experiments.masks.train static|revive CONFIG [...]

As train.py, but a prune makes no matrix smaller. It sets FFN weights to zero, in each matrix those
of the smallest size, and as many as the prune of neurons would remove. static: they stay zero.
revive: the optimizer goes on with all weights, and every prune_every steps the zeros are chosen
again (Dynamic Model Pruning with Feedback, 2006.07253). A resumed run has lost its masks.
"""

import sys

import torch

import train
from prune import Pruner


class Masks(Pruner):
    """Has masks of FFN weights, where Pruner slices neurons."""

    revive, every = False, 0  # every: steps from one choice of the zeros to the next

    def prune(self, model, optimizers, kind: str, width: int, batches: list) -> dict[str, list]:
        assert kind == "d_ff"
        if not hasattr(self, "weights"):
            self.full = model.shape().d_ff
            self.weights = [p for name, p in model.named_parameters() if ".ffn." in name]
            self.masks = [torch.ones_like(p, dtype=torch.bool) for p in self.weights]
            self.dense = [p.detach().clone() for p in self.weights]
            self.steps = 0
            optimizers[0].register_step_pre_hook(self.before_step)
            optimizers[0].register_step_post_hook(self.after_step)
        self.share = width / self.full
        self.choose()
        self.apply()
        return {}

    @torch.no_grad()
    def choose(self) -> None:
        for mask, dense in zip(self.masks, self.dense):
            size = dense.abs() if self.revive else dense.abs() * mask
            mask.zero_().view(-1)[size.flatten().topk(round(size.numel() * self.share)).indices] = 1

    @torch.no_grad()
    def apply(self) -> None:
        for p, mask, dense in zip(self.weights, self.masks, self.dense):
            p.copy_(dense * mask)

    @torch.no_grad()
    def before_step(self, *_) -> None:
        for p, mask, dense in zip(self.weights, self.masks, self.dense):
            if self.revive:
                p.copy_(dense)  # its gradient is that of the masked weight
            else:
                p.grad *= mask

    @torch.no_grad()
    def after_step(self, *_) -> None:
        for p, dense in zip(self.weights, self.dense):
            dense.copy_(p)
        self.steps += 1
        if self.revive and self.steps % self.every == 0:
            self.choose()
        self.apply()


def main() -> int:
    if len(sys.argv) < 3 or sys.argv[1] not in ("static", "revive"):
        print(__doc__)
        return 2
    Masks.revive = sys.argv[1] == "revive"
    Masks.every = train.load_config(sys.argv[2], sys.argv[3:]).prune_every
    train.Pruner = Masks
    return train.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
