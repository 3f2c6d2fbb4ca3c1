"""The plan against what really happens, and the bench on a toy."""

import platform
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_run import ROOT, toy  # noqa: F401 (a fixture)

from model import GPT, GPTConfig
from run.llama import config_json, write_json
from run.machine import keep_memory
from tools import bench, plan

SHAPE = GPTConfig(
    vocab_size=97, context_length=12, d_model=24, head_dim=6, queries_per_kv=2,
    n_kv_head=[2] * 5, d_ff=[40] * 5,
)  # fmt: skip


def kept_for_backward(shape: GPTConfig, batch: int, recompute: bool, dtype: torch.dtype) -> int:
    """On real tensors: bytes of all that a real forward pass of the whole model keeps."""
    model, kept = GPT(shape), {}
    model.recompute = recompute
    own = {p.data_ptr() for p in model.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    tokens = torch.randint(shape.vocab_size, (batch, shape.context_length))
    lower = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), lower:
        loss = model(tokens, tokens)
    del loss
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planned_activations_are_those_that_a_forward_pass_keeps(dtype):
    memory = plan.memory_of(SHAPE, 7, False, dtype, ranks=1, shard=False)
    kept = kept_for_backward(SHAPE, 7, False, dtype)
    assert memory.activations + memory.casts == pytest.approx(kept, rel=0.01)


def test_recomputing_keeps_a_block_and_one_input_per_layer():
    whole = plan.memory_of(SHAPE, 7, False, torch.float32, ranks=1, shard=False)
    less = plan.memory_of(SHAPE, 7, True, torch.float32, ranks=1, shard=False)
    kept = kept_for_backward(SHAPE, 7, True, torch.float32)
    one_block = (whole.activations - kept_for_backward(layers(0), 7, False, torch.float32)) / 5
    assert less.activations + less.casts == pytest.approx(kept + one_block, rel=0.05)
    assert less.activations < whole.activations / 2


@pytest.fixture
def folder_of(tmp_path):
    """Makes the config.json of a shape."""

    def make(shape: GPTConfig) -> Path:
        write_json(tmp_path / "config.json", config_json(shape, 0, 0))
        return tmp_path

    return make


def layers(n: int) -> GPTConfig:
    return replace(SHAPE, n_kv_head=[2] * n, d_ff=[40] * n)


def test_moments_are_shared_out_over_ranks():
    one = plan.memory_of(SHAPE, 1, False, torch.float32, ranks=1, shard=False)
    eight = plan.memory_of(SHAPE, 1, False, torch.float32, ranks=8, shard=True)
    assert one.weights == 4 * SHAPE.n_parameters() and one.moments == 2 * one.weights
    assert one.moments / 8 <= eight.moments < one.moments / 4 and eight.weights == one.weights
    largest = plan.memory_of(SHAPE, 1, False, torch.float32, ranks=1000, shard=True).moments
    assert largest == 8 * max(p.numel() for p in GPT(SHAPE).parameters())  # none is cut in two


def test_the_plan_of_the_big_run_says_what_fits_and_what_to_do(capsys):
    config = str(ROOT / "configs" / "idea_2.8b.py")
    assert bench.main([config, "--plan", "--gpus=8"]) == 0
    text = capsys.readouterr().out
    assert "| enlarged | 2.82B | 1T |" in text and "| recover | 1.31B | 500B |" in text
    assert text.count("| yes |") == 4
    total = float(re.search(r"the run \| \| 2T \| (\S+) \|", text)[1])
    parts = [
        float(x)
        for x in re.findall(r"^\| (?:enlarged|prune|recover) .*?B? \| (\S+e\+\d+)", text, re.M)
    ]
    assert len(parts) == 3 and sum(parts) == pytest.approx(total, rel=0.01)
    assert bench.main([config, "--plan", "--gpus=8", "--micro_batch_size=128"]) == 0
    best = int(re.search(r"no; --micro_batch_size=(\d+)", capsys.readouterr().out)[1])
    assert bench.main([config, "--plan", "--gpus=8", f"--micro_batch_size={best}"]) == 0
    assert capsys.readouterr().out.count("| yes |") == 4
    assert bench.main([config, "--plan", "--gpu=4090"]) == 0
    assert "no, not one sequence" in capsys.readouterr().out


def test_the_plan_is_for_the_run_that_train_would_make(folder_of, capsys):
    def planned(config: str, *knobs: str) -> str:
        code = bench.main([str(ROOT / "configs" / config), "--plan", *knobs])
        said = capsys.readouterr()
        return said.err if code else said.out

    assert "vocabulary 1,024" in planned("idea.py", "--gpus=1")
    flops = re.search(r"the run .* (\S+e\+12)", planned("idea.py", "--gpus=1"))[1]
    assert f"| train | 250k | 4.69M | {flops} |" in planned("scratch_flops.py", "--gpus=1")
    start = f"--init_from={folder_of(SHAPE)}"
    text = planned("smollm2.py", "--gpus=1", start, "--d_ff_target=16", "--round_to=8")
    assert f"| enlarged | {SHAPE.n_parameters() / 1e3:.3g}k |" in text and "vocabulary 97," in text
    for knobs, words in (
        (["--gpus=0"], "--gpus 0"),
        (["--gpus=7"], "batch_size=512: must divide by the 7 ranks"),
        (["--gpus=64"], "micro_batch_size=32: must divide the 8 sequences of each of 64 ranks"),
    ):
        assert words in planned("idea_gpt2.py", *knobs)


def test_the_bench_measures_a_toy(toy, capsys, tmp_path, monkeypatch):  # noqa: F811
    knobs = [str(toy), "--repeats=1", "--n_kv_head_target=0", "--max_steps=4000"]
    assert bench.main(knobs) == 0
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|", capsys.readouterr().out, re.M))
    for what in ("step with scoring / without", "the loop's step / bare step", "a prune, in steps"):
        assert float(rows[what]) > 0, what
    monkeypatch.setattr(bench, "matmul_peak", lambda device, dtype: 1e11)  # once is enough
    assert bench.main([*knobs[:3], "--max_steps=30"]) == 0  # scoring begins before step 4
    assert "the loop's step" not in capsys.readouterr().out
    trace = tmp_path / "trace.json"
    assert bench.main([str(toy), f"--profile={trace}"]) == 0
    assert trace.stat().st_size > 1000 and "aten::mm" in capsys.readouterr().out
    assert bench.main([str(Path("missing.py"))]) == 2 and "missing.py" in capsys.readouterr().err


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_a_step_frees_is_kept_for_the_next():
    keep_memory()
    x = torch.ones(2**24)  # 64 MiB
    held = bench.resident()
    del x
    assert bench.resident() > held - 2**25  # many cores count it less exactly than few
