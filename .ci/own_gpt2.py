"""Somebody's GPT-2: q, k and v in one matrix, biases, and of this project two files."""

import copy
import re
import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn import Embedding, Linear, Module, ModuleDict, ModuleList


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

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.transformer["h"]:
            x = block(x)
        return x @ self.embed.weight.T


def loss(model, step, share=slice(None)):
    tokens = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(step))[share]
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(lines: str, kind="d_ff", wrap=lambda model: model, share=slice(None)) -> GPT2:
    """By the lines for nanoGPT. Alone, each prune does what it does to zero the weakest units."""
    settings, setup, prunes, scores, saves = re.split("^# .*\n", lines, flags=re.M)[1:]
    names = {"max_iters": 60, "init_from": "scratch", "checkpoint": {}, "model_args": {}}
    names |= {"torch": torch, "DDP": wrap, "ddp": torch.distributed.is_initialized()}
    exec(settings, names)
    names |= {"d_ff": 512, "d_ff_target": 64, "n_head": 4, "n_head_target": 2}  # as by --d_ff=512
    model = names["model"] = GPT2(SimpleNamespace(d_ff=512, n_head=4))
    optimizer = names["optimizer"] = torch.optim.AdamW(model.parameters(), lr=1e-3)
    exec(setup, names)
    names["model"] = wrap(model)
    for names["iter_num"] in range(60):
        masked, old = copy.deepcopy(model), list(names["pruner"].scores.values())
        exec(prunes, names)
        for block, units in zip(masked.transformer["h"], old):
            gone = units.argsort()[: len(units) - getattr(model.config, kind)]
            reader = (block.attn if kind == "n_head" else block.mlp)["c_proj"].weight.data
            reader.unflatten(1, (len(units), -1))[:, gone] = 0
        if not names["ddp"]:
            tokens = torch.arange(50)[None]
            torch.testing.assert_close(model(tokens), masked(tokens), rtol=0, atol=1e-12)
        loss(names["model"], names["iter_num"], share).backward()
        exec(scores, names)
        optimizer.step()
        optimizer.zero_grad()
    exec(saves, names)
    assert names["checkpoint"]["scores"] and names["model_args"] == {kind: names[f"{kind}_target"]}
    return model


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    train(lines := sys.argv[1])
    heads = re.sub(r'mlp.c_fc.(\w+)", 0', r'attn.c_attn.\1", 0, 3', lines.replace("d_ff", "n_head"))
    print(train(heads.replace("mlp.c_proj", "attn.c_proj"), "n_head"))
