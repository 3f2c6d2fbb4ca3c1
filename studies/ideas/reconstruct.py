"""Prunes that mend the FFN: python -m studies.ideas.reconstruct CONFIG [...]

As train.py, but when neurons go, the columns of `down` that stay are computed again: by least
squares, so that on the step's batch the FFN's output is as close as possible to what it was.
"""

import sys

import torch

import train
from prune import Pruner, choose
from tools import command

RIDGE = 1e-3  # of the mean squared activation: keeps columns of rare neurons small


class Reconstructor(Pruner):
    @torch.no_grad()
    def prune(self, model, optimizers, kind: str, width: int, batches: list) -> dict[str, list]:
        assert kind == "d_ff"
        inputs = {}  # block -> the activations of its neurons, (tokens, neurons)
        hooks = [
            block.ffn.down.register_forward_hook(
                lambda down, args, _: inputs.__setitem__(down, args[0].flatten(0, 1).double())
            )
            for block in model.blocks
        ]
        model.eval()  # compiled blocks skip hooks
        model(batches[0][0])
        model.train()
        for hook in hooks:
            hook.remove()
        for i, block in enumerate(model.blocks):
            keep = choose(self.scores[f"blocks.{i}.d_ff"], width)
            down, x = block.ffn.down, inputs[block.ffn.down]
            kept = x[:, keep]
            square = kept.T @ kept
            square.diagonal().add_(RIDGE * square.diagonal().mean())
            # The change of the kept columns that makes up for what the others wrote
            lost = x[:, ~keep] @ down.weight[:, ~keep].double().T
            change = torch.linalg.solve(square, kept.T @ lost)  # (kept neurons, d_model)
            down.weight[:, keep] += change.T.to(down.weight)
        return super().prune(model, optimizers, kind, width, batches)


@command
def main(argv: list[str] | None = None) -> int:
    train.Pruner = Reconstructor
    return train.main(argv)


if __name__ == "__main__":
    sys.exit(main())
