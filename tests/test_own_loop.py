"""The pieces of docs/own-loop.md, run as they stand there."""

import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT
from own_gpt2 import GPT2, loss, train
from test_ranks import UPSIDE_DOWN, addresses
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from prune import Pruner, Slice, block_groups, whole
from run.config import Config
from run.machine import Machine
from schedule import Schedule, knobs

PAGE = (ROOT / "docs/own-loop.md").read_text(encoding="utf-8")
LOOP, CHECK, HOOK, TRAINER, NANOGPT, FSDP = re.findall("```python\n(.*?)```", PAGE, re.S)
HEADS = LOOP.replace("# widths", "widths")
TRAINER = LOOP.partition("schedule = ")[0] + TRAINER  # as its first comment says
HOOK = LOOP.replace("c = model", HOOK + "c = model").replace("pruner.score(", "id(")
PIECES = [("llama", LOOP), ("llama", HEADS), ("qwen2", HEADS), ("llama", HOOK), ("llama", TRAINER)]
SHAPE = {"vocab_size": 64, "hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4}
SHAPE |= {"num_hidden_layers": 2, "intermediate_size": 256, "pad_token_id": 0}
QKV = "gpt_neox", "num_attention_heads", "attention.query_key_value", "attention.dense.weight", 1, 3
GATES = "phi3", "intermediate_size", "mlp.gate_up_proj", "mlp.down_proj.weight", 2, 1


def test_a_gpt2_needs_two_files_of_this_project_and_no_other(tmp_path):
    for file in ("prune.py", "schedule.py", "tests/own_gpt2.py"):
        shutil.copy(ROOT / file, tmp_path)
    alone = [sys.executable, "-E", "own_gpt2.py", NANOGPT]  # whatever PYTHONPATH names
    subprocess.run(alone, cwd=tmp_path, check=True)


@pytest.mark.parametrize("name, piece", PIECES, ids=["mlp", "heads", "biases", "hook", "Trainer"])
def test_a_hugging_face_model_is_saved_loaded_and_resumed(name, piece, tmp_path, monkeypatch):
    """It has the same weights, where the training went on from amid the prunes."""
    transformers = pytest.importorskip("transformers")
    trainer = piece == TRAINER and pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    how = {"max_steps": 60, "save_steps": 15, "max_grad_norm": 0, "report_to": "none"}

    def get_batch(step):
        if step == 17:
            shutil.copytree("out", "cut")
        x = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(step))
        return {"input_ids": x, "labels": x}

    def run(model, checkpoint=None):
        args = trainer and transformers.TrainingArguments("out", use_cpu=True, **how)
        data = [{key: x[0] for key, x in get_batch(i).items()} for i in range(100, 200)]
        names = {"get_batch": get_batch, "steps": 60, "save_every": 8, "args": args, "data": data}
        exec(piece, names | {"model": model, "checkpoint": checkpoint})

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **SHAPE)
    model = transformers.AutoModelForCausalLM.from_config(config)
    run(model)
    assert model.config.intermediate_size == 96
    assert model.config.num_key_value_heads == (2 if piece == HEADS else 4)
    last, cut = "out/checkpoint-60", "out/checkpoint-15"
    if not trainer:
        last, cut = shutil.move("out", "whole"), shutil.move("cut", "out")
    x = get_batch(0)["input_ids"]
    assert torch.equal(load(last)(x).logits, model(x).logits)
    run(resumed := load(cut), cut)
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name, kind, fused, reader, right, wrong", [QKV, GATES])
def test_the_check_passes_right_parts_and_no_wrong_ones(name, kind, fused, reader, right, wrong):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **SHAPE))
    names = {"torch": torch, "model": model, "kind": kind, "follow": lambda *_: None}
    names["logits"] = lambda model: model(torch.arange(24)[None]).last_hidden_state

    def check(parts):
        slices = [Slice(f"{fused}.{x}", 0, parts) for x in ("weight", "bias")] + [Slice(reader, 1)]
        model.groups = lambda: block_groups(model, "layers", {kind: slices})
        exec(CHECK, names)

    check(right)
    with pytest.raises(AssertionError, match="a slice is wrong"):
        check(wrong)


def fsdp(share: slice, agree, **widths) -> GPT2:
    mesh = init_device_mesh("cpu", (2,))
    mlp = Slice("mlp.c_fc.weight", 0), Slice("mlp.c_fc.bias", 0), Slice("mlp.c_proj.weight", 1)
    qkv = Slice("attn.c_attn.weight", 0, 3), Slice("attn.c_attn.bias", 0, 3)
    units = {"d_ff": mlp, "num_key_value_heads": (*qkv, Slice("attn.c_proj.weight", 1))}

    def build(config):
        config.n_head = config.num_attention_heads
        model = GPT2(config)
        model.groups = lambda: block_groups(model, "transformer.h", units)
        for block in model.transformer["h"]:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    exec(FSDP, names := {"build": build, "torch": torch})
    model = build(SimpleNamespace(d_ff=512, num_attention_heads=4, num_key_value_heads=4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = Schedule(knobs(60, round_to=64, **widths))
    pruner = Pruner("sensitivity", 0.85, schedule.widths, 0, agree)
    for step in range(1, 61):
        for kind, width in schedule.new_widths(step).items():
            model = names["prune_sharded"](model, optimizer, pruner, kind, width)
        loss(model, step - 1, share).backward()
        pruner.score(model)
        optimizer.step()
        optimizer.zero_grad()
    moments = [(p, state["exp_avg"]) for p, state in optimizer.state.items()]
    assert all(p.placements == moment.placements for p, moment in moments)  # none is whole
    return model


def two_ranks() -> None:
    torch.set_default_dtype(torch.float64)
    alone, machine = train(NANOGPT), Machine(Config(device="cpu"))
    exec(UPSIDE_DOWN, {"os": os})  # the scores of the second rank must not count
    mine = slice(machine.rank, None, 2)
    sharded = fsdp(mine, machine.agree, d_ff=512, d_ff_target=64)
    for other in (train(NANOGPT, wrap=DistributedDataParallel, share=mine), sharded):
        for name, p in other.named_parameters():
            torch.testing.assert_close(whole(p), alone.get_parameter(name), rtol=0, atol=1e-6)
    c = fsdp(mine, machine.agree, num_key_value_heads=4, num_key_value_heads_target=2).config
    assert (c.num_key_value_heads, c.num_attention_heads) == (2, 2)
    torch.distributed.destroy_process_group()


def test_two_ranks_train_like_one_by_the_lines_for_nanogpt_and_fsdp2(processes):
    ended, error = processes("import test_own_loop as t; t.two_ranks()", environments=addresses(2))
    assert ended == [0, 0], error
