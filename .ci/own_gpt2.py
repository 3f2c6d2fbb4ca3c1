"""Somebody's GPT-2, with biases and q, k and v in one matrix, and of this project two files."""

import copy
import sys
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

FC = Slice("mlp.c_fc.weight", 0), Slice("mlp.c_fc.bias", 0)
QKV = Slice("attn.c_attn.weight", 0, 3), Slice("attn.c_attn.bias", 0, 3)
UNITS = {"d_ff": (*FC, Slice("mlp.c_proj.weight", 1))}
UNITS |= {"n_head": (*QKV, Slice("attn.c_proj.weight", 1))}
WIDTHS = {"d_ff": 512, "d_ff_target": 64, "n_head": 4, "n_head_target": 2}


class Block(Module):
    def __init__(self, c):
        super().__init__()
        d = 4 * c.n_head
        self.attn = ModuleDict({"c_attn": Linear(16, 3 * d), "c_proj": Linear(d, 16)})
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
        return block_groups(self, "transformer.h", UNITS)

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


def masked(model, old, kind):
    """A copy, in which the units that will go are zero. old: scores."""
    model, width = copy.deepcopy(model), getattr(model.config, kind)
    for block, units in zip(model.transformer["h"], old):
        gone = units.argsort()[: len(units) - width]
        reader = (block.attn if kind == "n_head" else block.mlp)["c_proj"].weight.data
        reader.unflatten(1, (len(units), -1))[:, gone] = 0
    return model


def train(kind="d_ff", how="alone", prune_sharded=None) -> Module:
    """Alone, each prune does what it does to zero the weakest units."""
    config = SimpleNamespace(d_ff=512, n_head=4)
    ranks, share = (
        how != "alone",
        slice(dist.get_rank(), None, 2) if how != "alone" else slice(None),
    )
    model = sharded(config) if how == "FSDP" else GPT2(config)
    wrap = DistributedDataParallel if how == "DDP" else lambda model: model
    optimizer, outer = torch.optim.AdamW(model.parameters(), lr=1e-3), wrap(model)
    plan = Schedule(knobs(60, **{key: WIDTHS[key] for key in (kind, f"{kind}_target")}))
    agree = (lambda mask: dist.broadcast(mask, 0) or mask) if ranks else None
    pruner = Pruner("sensitivity", 0.85, plan.widths, 0, agree, [optimizer])
    for step in range(1, 61):
        for _, width in plan.new_widths(step).items():
            if prune_sharded:
                model = outer = prune_sharded(model, optimizer, pruner, kind, width)
                continue
            before, old = copy.deepcopy(model), list(pruner.scores.values())
            pruner.prune(model, [optimizer], kind, width)
            setattr(model.config, kind, width)
            outer, tokens = wrap(model), torch.arange(50)[None]
            if not ranks:
                before.config = model.config
                zeroed = masked(before, old, kind)(tokens)
                torch.testing.assert_close(model(tokens), zeroed, rtol=0, atol=1e-12)
        tokens = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(step))[share]
        logits = outer(tokens[:, :-1]).flatten(0, 1)
        F.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
        pruner.score(model)
        optimizer.step()
        optimizer.zero_grad()
    assert getattr(model.config, kind) == WIDTHS[f"{kind}_target"]
    if how == "FSDP":
        moments = [(p, state["exp_avg"]) for p, state in optimizer.state.items()]
        assert all(p.placements == moment.placements for p, moment in moments)  # none is whole
    return model


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    for kind in sys.argv[1:]:
        print(train(kind))
