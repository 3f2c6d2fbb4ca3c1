"""Stochastic gates: python -m studies.ideas.gates CONFIG --prune_schedule=oneshot [...]

As train.py, but from 5% of the run to its one prune, each neuron is on in a step with a probability
of its own, which is learned. Their mean falls to the target's share. The prune keeps the neurons
with the highest. The weights that these had at the start are saved in OUT_DIR/winners: with
--init_from, a control trains from them. --resume is refused: checkpoints have no gates.
"""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

import model as model_file
import train
from prune import Pruner, choose, slice_group
from run import UserError
from run.checkpoint import save_checkpoint
from run.read_config import load_config
from schedule import make_schedule
from tools import command

FIRST = 0.05  # the part of the run before the gates
RATE = 0.02  # of the gates' Adam


class Gates:
    """One logit for each neuron, and what draws and learns them."""

    def __init__(self, model, c):
        self.model, self.c, self.step = model, c, 0
        self.first, self.last = round(FIRST * c.max_steps), make_schedule(c).window[0] - 1
        self.initial = copy.deepcopy(model)
        self.generator = torch.Generator().manual_seed(c.seed)
        self.logits = torch.zeros(len(model.blocks), c.d_ff, requires_grad=True)
        self.adam = torch.optim.Adam([self.logits], lr=RATE)
        for block in model.blocks:
            block.ffn.open = torch.ones(())

    def probabilities(self):
        """(layers, neurons), with the mean of each layer where this step wants it."""
        progress = min(1, (self.step + 1 - self.first) / (self.last - self.first))
        share = 1 - progress * (1 - self.c.d_ff_target / self.c.d_ff)
        high = torch.full((len(self.logits), 1), 30.0)
        low = -high
        for _ in range(40):  # bisection: what to add to a layer's logits
            shift = (low + high) / 2
            less = torch.sigmoid(self.logits.detach() + shift).mean(1, keepdim=True) < share
            low, high = torch.where(less, shift, low), torch.where(less, high, shift)
        return torch.sigmoid(self.logits + shift)

    def before_forward(self, *_) -> None:
        if self.model.training and self.first < self.step + 1 <= self.last:
            p = self.probabilities()
            on = torch.bernoulli(p.detach(), generator=self.generator)
            self.open = on + p - p.detach()  # 0 or 1; its gradient is p's
            for block, gates in zip(self.model.blocks, self.open):
                block.ffn.open = gates.detach().requires_grad_()

    def after_step(self, *_) -> None:
        self.step += 1
        if self.first < self.step <= self.last:
            gradients = torch.stack([block.ffn.open.grad for block in self.model.blocks])
            self.adam.zero_grad()
            self.open.backward(gradients)
            self.adam.step()

    def end(self, width: int) -> dict[str, torch.Tensor]:
        """The neurons' last probabilities, by group. Saves the winners' initial weights."""
        p = self.probabilities().detach()
        shares = [f"{(p < x).float().mean():.2f} below {x}" for x in (0.1, 0.5, 0.9)]
        print(f"gates: {', '.join(shares)}")
        scores = {f"blocks.{i}.d_ff": row.clone() for i, row in enumerate(p)}
        for group in [g for g in self.initial.groups() if g.kind == "d_ff"]:
            slice_group(self.initial, [], group, choose(scores[group.name], width))
        folder = Path(self.c.out_dir) / "winners"
        folder.mkdir()
        save_checkpoint(replace(self.c, out_dir=str(folder)), 0, self.initial, [], {}, {})
        for block in self.model.blocks:
            block.ffn.open = torch.ones(())
        return scores


class Winners(Pruner):
    gates = None

    def score(self, model) -> None:
        """Nothing: the gates are the scores."""

    def prune(self, model, optimizers, kind: str, width: int, batches: list) -> dict[str, list]:
        assert kind == "d_ff"
        self.scores = self.gates.end(width)
        return super().prune(model, optimizers, kind, width, batches)


def gated(self, x):
    return self.down(F.silu(self.gate(x)) * self.up(x) * self.open)


def make_optimizers(model, c, dtype, make=train.make_optimizers):
    optimizers = make(model, c, dtype)
    Winners.gates = Gates(model, c)
    model.register_forward_pre_hook(Winners.gates.before_forward)
    optimizers[0].register_step_post_hook(Winners.gates.after_step)
    return optimizers


@command
def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or "--resume" in argv:
        raise UserError("usage: studies.ideas.gates CONFIG [...], no --resume")
    c = load_config(argv[0], argv[1:])
    if c.prune_schedule != "oneshot" or not c.d_ff_target:
        raise UserError("the gates need --prune_schedule=oneshot and a d_ff_target")
    model_file.FeedForward.forward = gated
    train.make_optimizers, train.Pruner = make_optimizers, Winners
    return train.main(argv)


if __name__ == "__main__":
    sys.exit(main())
