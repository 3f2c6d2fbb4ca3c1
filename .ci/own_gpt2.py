"""Somebody's GPT-2, with biases and q, k and v in one matrix, and of this project two files."""

import copy
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import Embedding, Linear, Module, ModuleDict, ModuleList
from torch.nn.parallel import DistributedDataParallel

from prune import Pruner, Slice, block_groups
from schedule import Schedule, knobs

MLP = Slice("mlp.c_fc.weight", 0), Slice("mlp.c_fc.bias", 0), Slice("mlp.c_proj.weight", 1)


class Block(Module):
    def __init__(self, c):
        super().__init__()
        self.attn = ModuleDict({"c_attn": Linear(16, 48), "c_proj": Linear(16, 16)})
        self.mlp = ModuleDict({"c_fc": Linear(16, c.d_ff), "c_proj": Linear(c.d_ff, 16)})

    def forward(self, x):
        q, k, v = self.attn["c_attn"](x).unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](y.transpose(1, 2).flatten(2))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](x)))


class GPT2(Module):
    def __init__(self, c):
        super().__init__()
        torch.manual_seed(0)
        self.config, self.embed = c, Embedding(50, 16)
        self.transformer = ModuleDict({"h": ModuleList(Block(c) for _ in range(2))})

    def groups(self):
        return block_groups(self, "transformer.h", {"d_ff": MLP})

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.transformer["h"]:
            x = block(x)
        return x @ self.embed.weight.T


def sharded(c) -> Module:
    mesh, model = init_device_mesh("cpu", (2,)), GPT2(c)
    for block in model.transformer["h"]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(how="alone", prune_sharded=None) -> Module:
    """Alone, each prune does what it does to zero the weakest units."""
    share = slice(None) if how == "alone" else slice(dist.get_rank(), None, 2)
    wrap = DistributedDataParallel if how == "DDP" else lambda model: model
    model = (sharded if how == "FSDP" else GPT2)(SimpleNamespace(d_ff=512))
    optimizer, outer = torch.optim.AdamW(model.parameters(), lr=1e-3), wrap(model)
    plan = Schedule(knobs(60, d_ff=512, d_ff_target=64))
    first = None if how == "alone" else lambda mask: dist.broadcast(mask, 0) or mask
    pruner = Pruner("sensitivity", 0.85, plan.widths, 0, first, [optimizer])
    for step in range(1, 61):
        for kind, width in plan.new_widths(step).items():
            if prune_sharded:
                model = outer = prune_sharded(model, optimizer, pruner, kind, width)
                continue
            zeroed, old = copy.deepcopy(model), list(pruner.scores.values())
            pruner.prune(model, [optimizer], kind, width)
            model.config.d_ff, outer = width, wrap(model)
            for block, scores in zip(zeroed.transformer["h"], old):
                block.mlp["c_proj"].weight.data[:, scores.argsort()[: len(scores) - width]] = 0
            if how == "alone":
                tokens = torch.arange(50)[None]
                torch.testing.assert_close(model(tokens), zeroed(tokens), rtol=0, atol=1e-12)
        tokens = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(step))[share]
        logits = outer(tokens[:, :-1]).flatten(0, 1)
        F.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
        pruner.score(model)
        optimizer.step()
        optimizer.zero_grad()
    assert model.config.d_ff == 64
    if how == "FSDP":
        moments = [(p, state["exp_avg"]) for p, state in optimizer.state.items()]
        assert all(p.placements == moment.placements for p, moment in moments)  # none is whole
    return model


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    print(train())
