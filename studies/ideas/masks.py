"""Single weights instead of neurons: python -m studies.ideas.masks static|revive CONFIG [...]

As train.py, but a prune makes no matrix smaller. It sets FFN weights to zero, in each matrix those
of the smallest size, and as many as the prune of neurons would remove. static: they stay zero.
revive: the optimizer goes on with all weights, and every prune_every steps the zeros are chosen
again (Dynamic Model Pruning with Feedback, 2006.07253). --resume is refused: checkpoints have no
masks.
"""

import sys

import torch

import train
from prune import Pruner
from run import UserError
from run.read_config import load_config
from tools import command


class Masks(Pruner):
    """Has masks of FFN weights, where Pruner slices neurons."""

    revive, every = False, 0  # every: steps from one choice of the zeros to the next

    def score(self, model) -> None:
        """Nothing: single weights are chosen by their size."""

    def prune(self, model, optimizers, kind: str, width: int, batches: list) -> dict[str, list]:
        assert kind == "d_ff"
        if not hasattr(self, "weights"):
            self.full = model.config.d_ff
            self.weights = [p for name, p in model.named_parameters() if ".ffn." in name]
            self.masks = [torch.ones_like(p, dtype=torch.bool) for p in self.weights]
            self.dense = [p.detach().clone() for p in self.weights]
            self.steps = 0
            model.register_forward_pre_hook(self.before_forward)
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

    def before_forward(self, model, _) -> None:
        if self.revive and model.training and self.steps % self.every == 0:
            self.choose()
            self.apply()

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
        self.apply()


@command
def main(argv: list[str] | None = None) -> int:
    way, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if way not in ("static", "revive") or not rest or "--resume" in rest:
        raise UserError("usage: studies.ideas.masks static|revive CONFIG [...], no --resume")
    Masks.revive, Masks.every = way == "revive", load_config(rest[0], rest[1:]).prune_every
    train.Pruner = Masks
    return train.main(rest)


if __name__ == "__main__":
    sys.exit(main())
