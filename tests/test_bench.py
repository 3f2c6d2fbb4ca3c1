"""The plan against what really happens, and the bench on a toy."""

import contextlib
import json
import re
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from model import KINDS, GPTConfig
from run.config import Config
from run.cost import block_flops, flops_per_token, make_plan, memory_of, muon_flops, n_parameters
from run.machine import choose_dtype
from run.read_config import load_config
from tools import bench, plan

SHAPE = GPTConfig(
    vocab_size=256, context_length=64, n_layer=3, d_model=64, head_dim=16, queries_per_kv=2,
    n_kv_head=2, d_ff=256,
)  # fmt: skip


CELLS = [
    ({}, 1, True, "float32", False),
    ({"vocab_size": 8192}, 16, False, "bfloat16", False),
    ({"vocab_size": 8192}, 16, True, "float32", True),
    ({"d_ff": 2048}, 16, False, "float32", False),
    ({"d_ff": 32}, 2, True, "bfloat16", True),
    ({"n_kv_head": 8, "tie_embeddings": False}, 16, True, "float32", False),
    ({"context_length": 512}, 2, False, "float32", False),
]


@pytest.mark.parametrize("changes, sequences, recompute, dtype, taught", CELLS)
def test_planned_memory_is_what_steps_take_at_their_peak(
    changes, sequences, recompute, dtype, taught
):
    shape = replace(SHAPE, **changes)
    teacher = replace(shape, d_ff=8192) if taught else None
    size = {"batch_size": sequences, "context_length": shape.context_length}
    c = Config(**size, recompute=recompute, dtype=dtype)
    measured = bench.peak_memory(c, shape, torch.device("cpu"), teacher)
    planned = memory_of(c, shape, sequences, getattr(torch, dtype), teacher)
    # Without such instructions, a bfloat16 product takes a float32 copy of its output
    emulated = dtype == "bfloat16" and choose_dtype(Config(), torch.device("cpu")) == torch.float32
    assert sum(planned.values()) == pytest.approx(measured, rel=0.1 if emulated else 0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_plan_counts_the_work_that_torch_counts_in_a_step(optimizer, recompute):
    c = Config(batch_size=4, context_length=64, optimizer=optimizer, recompute=recompute)
    step, counter = bench.Step(c, SHAPE, torch.device("cpu")), FlopCounterMode(display=False)
    # Compiled blocks compute all again. Eager ones stop before the last product, which none needs
    with sdpa_kernel(SDPBackend.MATH), set_checkpoint_early_stop(False), counter:
        step()
    planned = 4 * 64 * (flops_per_token(SHAPE) + recompute * block_flops(SHAPE))
    planned += muon_flops(SHAPE) if optimizer == "muon" else 0
    assert counter.get_total_flops() == planned


def planned(capsys, config: str, *arguments: str) -> str:
    code = plan.main([f"configs/{config}.py", *arguments])
    said = capsys.readouterr()
    return said.err if code else said.out


def rows(text: str) -> dict[str, list[str]]:
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {name: cells for name, *cells in table}


def test_the_plan_of_the_big_run_says_what_it_costs_and_what_fits(capsys):
    table = rows(planned(capsys, "idea_2.8b", "--gpus=64", "--gpu=h100"))
    assert table["enlarged"][:2] == ["2.82B", "1T"] and table["recover"][:2] == ["1.31B", "500B"]
    phases = [table[name] for name in ("enlarged", "prune", "recover")]
    for optimizer, muon in (("adamw", 0), ("muon", 5.7e21)):
        table = rows(planned(capsys, "idea_2.8b", "--gpus=64", f"--optimizer={optimizer}"))
        work, hours = [float(x) for x in table["the run"][2:5]], float(table["the run"][5])
        assert work == pytest.approx([2.84e22, 9.05e21, muon], rel=0.01)
        assert hours == pytest.approx(sum(work) / (64 * 0.4 * 989e12) / 3600, rel=0.01)
        by_phase = sum(float(table[name][5]) for name in ("enlarged", "prune", "recover"))
        assert by_phase == pytest.approx(hours, rel=0.01)
    assert [cells[-1] for cells in phases] == ["yes"] * 3
    text = planned(capsys, "idea_2.8b", "--gpus=8", "--micro_batch_size=128")
    best = int(re.search(r"no; --micro_batch_size=(\d+)", text)[1])
    for size, fits in ((best, "yes"), (2 * best, "no")):
        text = planned(capsys, "idea_2.8b", "--gpus=8", f"--micro_batch_size={size}")
        assert rows(text)["enlarged"][-1].startswith(fits)
    assert "no; not one sequence fits" in planned(capsys, "idea_2.8b", "--gpu=4090")
    assert "no; --recompute" in planned(capsys, "idea_2.8b", "--gpu=4090", "--recompute=False")


def test_the_plan_is_for_the_run_that_train_would_make(capsys, tmp_path):
    text = planned(capsys, "idea", "--gpus=1")
    idea = make_plan(load_config("configs/idea.py"), 1024)
    ratio, steps = re.search(r"FLOPs: (\S+) times .* max_steps=(\d+)", text).groups()
    per_step = flops_per_token(idea.final) * 32 * 128
    assert abs(int(steps) * per_step - idea.flops()) < per_step
    assert float(ratio) == pytest.approx(idea.flops() / (1000 * per_step), abs=0.005)
    assert "vocabulary of 1,024" in text and "vocabulary of 50,304" in planned(capsys, "idea_gpt2")
    shape = replace(SHAPE, d_ff=48)
    folder = {
        "model_type": "llama", "vocab_size": 256, "num_hidden_layers": 3, "hidden_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
        "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(folder))
    start = f"--init_from={tmp_path}"
    text = planned(capsys, "smollm2", "--gpus=1", start, "--d_ff_target=16", "--round_to=8")
    assert rows(text)["enlarged"][0] == f"{n_parameters(shape) / 1e3:.3g}k"
    words = "micro_batch_size=32: must divide the 8 sequences of each of 64 ranks"
    assert words in planned(capsys, "idea_gpt2", "--gpus=64")


ABSURD = [
    ("--mfu=nan", "argument --mfu: 'nan' is not from 0.001 to 1"),
    ("--mfu=0", "argument --mfu: "),
    ("--price=-3", "argument --price: '-3' is not from 0"),
    ("--gpus=0", "argument --gpus: '0' is not from 1 to"),
    ("--batch_size=1000000000000", "batch_size=1000000000000: a plan has at most"),
]


@pytest.mark.parametrize("argument, words", ABSURD)
def test_the_plan_refuses_absurd_numbers_at_once(argument, words, capsys):
    with contextlib.suppress(SystemExit):  # argparse's
        assert plan.main(["configs/idea.py", argument]) == 2
    said = capsys.readouterr()
    assert re.search(words, said.err.splitlines()[-1]) and not said.out


def test_the_bench_measures_a_toy(toy, capsys, monkeypatch):
    """What it took is the machine's; what it counts is not."""
    monkeypatch.setattr(bench, "race", lambda calls, *_: [bench.seconds_of(c) for c in calls])
    assert bench.main([str(toy), "--repeats=2", "--micro_batch_size=4"]) == 0
    table = {what: cells[0] for what, cells in rows(capsys.readouterr().out).items()}
    peak, memory = map(int, re.findall(r"(\d+) MiB", table["peak memory"]))
    assert abs(peak - memory) <= 1
    toy_plan = make_plan(load_config(str(toy)), 1024)
    fewer = 1 - flops_per_token(toy_plan.final) / flops_per_token(toy_plan.shape(1))
    assert f"{fewer:.0%} fewer FLOPs" in table["the final shape"] and "a prune alone" in table
    whole = [f"--{kind}_target=0" for kind in KINDS]
    assert bench.main([str(toy), *whole]) == 0
    assert "the final shape" not in rows(capsys.readouterr().out)
    assert bench.main(["missing.py"]) == 2 and "missing.py" in capsys.readouterr().err


def test_the_share_of_a_cards_peak_is_shown_where_it_is_known(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert bench.share(400e12, 800e12, cuda) == "50% of 8e+14 FLOP/s; MFU 40% (h100)"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert bench.share(400e12, 800e12, cuda) == "50% of 8e+14 FLOP/s"
