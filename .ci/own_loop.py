"""Tests of the code in docs/own-loop.md, which pages.py collects.

The models are those of transformers, and a GPT-2 with only two files of this project.
"""

import os
import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import ROOT
from test_ranks import UPSIDE_DOWN, addresses
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import Embedding, Linear, Module, ModuleDict, ModuleList
from torch.nn.parallel import DistributedDataParallel

from prune import Pruner, Slice, block_groups, gathered
from schedule import Schedule, knobs

OWN_LOOP = (ROOT / "docs/own-loop.md").read_text(encoding="utf-8")
LOOP, CHECK, TRAINER, FSDP = re.findall("```python\n(.*?)```", OWN_LOOP, re.S)
TRAINER = LOOP.partition("schedule = ")[0] + TRAINER  # as its first comment says
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
SHAPE |= {"num_hidden_layers": 2, "intermediate_size": 256, "pad_token_id": 0}
MLP = (
    Slice("mlp.c_fc.weight", 0),
    Slice("mlp.c_fc.bias", 0),
    Slice("mlp.c_proj.weight", 1),
)


class Block(Module):
    def __init__(self, c):
        super().__init__()
        self.mlp = ModuleDict(
            {"c_fc": Linear(16, c.d_ff), "c_proj": Linear(c.d_ff, 16)}
        )

    def forward(
        self, x
    ):  # (B, T, 16), as attention does not matter here: a mean of what came
        x = x + x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
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
    share = slice(None) if how == "alone" else slice(dist.get_rank(), None, 2)
    wrap = DistributedDataParallel if how == "DDP" else lambda model: model
    model = (sharded if how == "FSDP" else GPT2)(SimpleNamespace(d_ff=512))
    optimizer, outer = torch.optim.AdamW(model.parameters(), lr=1e-3), wrap(model)
    plan = Schedule(knobs(60, d_ff=512, d_ff_target=64))
    first = None if how == "alone" else lambda mask: dist.broadcast(mask, 0) or mask
    pruner = Pruner("sensitivity", 0.85, plan.widths, 0, first, [optimizer])
    for step in range(1, 61):
        for kind, width in plan.new_widths(step).items():
            if how == "FSDP":
                model = outer = prune_sharded(model, optimizer, pruner, kind, width)
                continue
            pruner.prune(model, [optimizer], kind, width)
            model.config.d_ff, outer = width, wrap(model)
        tokens = torch.randint(
            50, (4, 9), generator=torch.Generator().manual_seed(step)
        )[share]
        logits = outer(tokens[:, :-1]).flatten(0, 1)
        F.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
        pruner.score(model)
        optimizer.step()
        optimizer.zero_grad()
    assert model.config.d_ff == 64
    if how == "FSDP":
        moments = [(p, state["exp_avg"]) for p, state in optimizer.state.items()]
        assert all(
            p.placements == moment.placements for p, moment in moments
        )  # none is whole
    return model


@pytest.mark.parametrize("name, piece", [("qwen2", LOOP), ("llama", TRAINER)])
def test_a_hugging_face_model_is_saved_loaded_and_resumed(
    name, piece, tmp_path, monkeypatch
):
    """It has the same weights, where the training went on from amid the prunes."""
    transformers = pytest.importorskip("transformers")
    trainer = piece == TRAINER and pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    how = {"max_steps": 60, "save_steps": 15, "max_grad_norm": 0, "report_to": "none"}

    def get_batch(step):
        x = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(step))
        return {"input_ids": x, "labels": x}

    def run(model, checkpoint=None):
        args = trainer and transformers.TrainingArguments("out", use_cpu=True, **how)
        data = [{key: x[0] for key, x in get_batch(i).items()} for i in range(100, 200)]
        names = {
            "get_batch": get_batch,
            "steps": 60,
            "save_every": 8,
            "args": args,
            "data": data,
        }
        exec(piece, names | {"model": model, "checkpoint": checkpoint})

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **SHAPE)
    run(model := transformers.AutoModelForCausalLM.from_config(config))
    assert model.config.intermediate_size == 96
    x, saved = get_batch(0)["input_ids"], f"out/checkpoint-{15 if trainer else 16}"
    assert torch.equal(load("out/checkpoint-60")(x).logits, model(x).logits)
    run(resumed := load(saved), saved)
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_the_check_passes_right_parts_and_no_wrong_ones():
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_config(
        transformers.AutoConfig.for_model("phi3", **SHAPE)
    )
    names = {
        "torch": torch,
        "model": model,
        "follow": lambda *_: None,
        "kind": "intermediate_size",
    }
    names["logits"] = lambda model: model(torch.arange(24)[None]).last_hidden_state

    def check(parts):
        slices = [
            Slice("mlp.gate_up_proj.weight", 0, parts),
            Slice("mlp.down_proj.weight", 1),
        ]
        model.groups = lambda: block_groups(model, "layers", {names["kind"]: slices})
        exec(CHECK, names)

    check(2)
    with pytest.raises(AssertionError, match="a slice is wrong"):
        check(1)


def two_ranks() -> None:
    torch.set_default_dtype(torch.float64)
    alone = train()
    dist.init_process_group("gloo")
    exec(UPSIDE_DOWN, {"os": os})  # the scores of the second rank must not count
    exec(FSDP, names := {"build": sharded, "torch": torch})
    for how in ("DDP", "FSDP"):
        for name, p in train(how, names["prune_sharded"]).named_parameters():
            torch.testing.assert_close(
                gathered(p), alone.get_parameter(name), rtol=0, atol=1e-6
            )
    dist.destroy_process_group()


def test_two_ranks_train_like_one_with_ddp_and_by_the_lines_for_fsdp2(processes):
    code = (
        f"sys.path.append({str(ROOT / '.ci')!r}); import own_loop; own_loop.two_ranks()"
    )
    ended, error = processes(code, environments=addresses(2))
    assert ended == [0, 0], error
