"""The plan against what really happens, and the bench on a toy."""

import functools
import locale
import re
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from helpers import events, run
from test_model import SHAPES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from model import GPTConfig
from run import cost
from run.config import CHOICES, Config, load_config
from run.cost import (
    GPUS,
    Plan,
    block_flops,
    flops_per_token,
    memory_of,
    muon_flops,
    n_parameters,
)
from run.machine import Machine
from tools import bench, plan

SHAPE = GPTConfig(256, 64, 3, 64, 16, 2, 2, 256)  # in the order of SHAPES
LARGE = [
    ({"vocab_size": 2048}, 8, "none", "bfloat16", "off"),
    ({"d_ff": 2048}, 16, "none", "float32", "on"),
    ({"d_ff": 2048}, 16, "cheap", "float32", "off"),
    ({"d_ff": 2048}, 16, "cheap", "float32", "on"),
    ({"n_kv_head": 8, "tie_embeddings": False}, 16, "all", "float32", "off"),
    ({"context_length": 512}, 2, "none", "float32", "off"),
]

NANOGPT = """import torch, types
GPTConfig = types.SimpleNamespace
class GPT(torch.nn.Embedding):
    def __init__(self, config):
        print("number of parameters")
        super().__init__(config.vocab_size, config.n_embd)
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas)
    def forward(self, tokens, targets):
        logits = super().forward(tokens) @ self.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""  # what is used here of its model.py


@pytest.mark.parametrize("changes, sequences, recompute, dtype, compile", LARGE)
def test_planned_memory_is_what_steps_take_at_their_peak(
    changes, sequences, recompute, dtype, compile, monkeypatch
):
    if compile == "on" and "utf" not in locale.getpreferredencoding(False).lower():
        pytest.skip(
            "torch's compiler reads its own files by the locale, and these are UTF-8"
        )
    backend = (
        "aot_eager_decomp_partition"  # keeps what Inductor does, and needs no compiler
    )
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend=backend)
    )
    shape = replace(SHAPE, **changes)
    size = {"batch_size": sequences, "context_length": shape.context_length}
    c = Config(**size, recompute=recompute, dtype=dtype, compile=compile)
    measured = bench.peak_memory(c, shape, Machine(c))
    assert sum(memory_of(c, shape, sequences).values()) == pytest.approx(
        measured, rel=0.1
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("recompute", CHOICES["recompute"])
def test_the_plan_counts_the_work_that_torch_counts_in_a_step(
    shape, optimizer, recompute
):
    c = Config(
        batch_size=4, context_length=12, optimizer=optimizer, recompute=recompute
    )
    step, counter = bench.Step(c, shape, Machine(c)), FlopCounterMode(display=False)
    # Compiled blocks compute all again. Eager ones stop before the last product, which none needs
    with sdpa_kernel(SDPBackend.MATH), set_checkpoint_early_stop(False), counter:
        step()
    planned = (
        4 * 12 * (flops_per_token(shape) + (recompute == "all") * block_flops(shape))
    )
    planned += muon_flops(shape) if optimizer == "muon" else 0
    assert counter.get_total_flops() == planned
    assert n_parameters(shape) == sum(p.numel() for p in step.model.parameters())


def planned(capsys, config: str, *arguments: str) -> str:
    assert plan.main([config, *arguments]) == 0
    return capsys.readouterr().out


def rows(text: str) -> dict[str, list[str]]:
    table = [
        line.strip("| ").split(" | ")
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return {name: cells for name, *cells in table}


def test_the_plan_of_the_big_run_says_what_it_costs_and_what_fits(capsys, refused):
    config = "configs/idea_2.8b.py"
    table = rows(planned(capsys, config, "--gpus=64"))
    work, hours = float(table["the run"][3]), float(table["the run"][5])
    assert work == pytest.approx(2.84e22, rel=0.01)
    assert table["the run"][6] == f"{work / (hours * 3600 * 64 * 989e12):.0%}"
    phases = [table[name] for name in ("enlarged", "prune", "recover")]
    assert sum(float(cells[5]) for cells in phases) == pytest.approx(hours, rel=0.01)
    assert [cells[-1] for cells in phases] == ["yes"] * 3
    assert phases[0][:3] == ["2.82B", "1.00T", "81%"] and phases[2][:3] == [
        "1.31B",
        "500B",
        "3%",
    ]
    for slower in ("--recompute=all", "--micro_batch_size=2", "--optimizer=muon"):
        text = planned(capsys, config, "--gpus=64", slower)
        assert float(rows(text)["the run"][5]) > hours
    assert "no; --micro_batch_size=4" in planned(
        capsys, config, "--micro_batch_size=128"
    )
    assert "no; not one sequence fits" in planned(capsys, config, "--gpu=4090")
    refused("micro_batch_size=4: must divide", config, "--gpus=1024", main=plan.main)


def test_a_long_run_is_planned_by_its_shapes_and_not_by_its_steps(capsys, monkeypatch):
    calls = []
    for steps in (20_000, 30_000):
        monkeypatch.setattr(cost, "flops_per_token", Mock(wraps=flops_per_token))
        planned(capsys, "configs/idea.py", f"--max_steps={steps}")
        calls.append(cost.flops_per_token.call_count)
    assert calls[0] == calls[1] > 0
    # A search of all micro batches would meet the deadline of the suite
    assert "micro_batch_size=" in planned(
        capsys, "configs/idea.py", "--batch_size=1000000000000"
    )


def test_the_log_has_the_mfu_of_a_known_card(toy, tmp_path, monkeypatch, capsys):
    for name, key in (
        ("RTX 4090", "4090"),
        ("RTX 4090 Laptop GPU", ""),
        ("RTX A1000", ""),
    ):
        monkeypatch.setattr(
            "torch.cuda.get_device_name", lambda device, name=name: name
        )
        assert cost.card_of(torch.device("cuda")) == key
    monkeypatch.setattr("run.log.card_of", lambda device: "toy")
    monkeypatch.setitem(GPUS, "toy", (1e10, 0, 0))
    assert run(toy, tmp_path, "--stop_after=1") == 0
    (step,) = events(tmp_path, "step")
    flops = flops_per_token(Plan(load_config(str(toy)), 1024).enlarged)
    assert step["mfu"] == pytest.approx(
        step["tokens_per_second"] * flops / 1e10, rel=0.01
    )
    assert f" MFU {step['mfu']:.0%} " in capsys.readouterr().out


def test_the_plan_is_for_the_run_that_train_would_make(toy, undisturbed, capsys):
    text = planned(capsys, "configs/idea.py", "--gpus=1")
    even = load_config("configs/scratch_flops.py").max_steps  # test_compare.py
    assert (
        "vocabulary of 1,024" in text
        and f"With max_steps={even}, scratch has as many." in text
    )
    assert "vocabulary of 50,304" in planned(capsys, "configs/idea_gpt2.py")
    text = planned(capsys, str(toy), f"--init_from={undisturbed}", "--gpus=1")
    params = events(undisturbed, "done")[0]["params"]
    assert rows(text)["train"][0] == f"{params / 1e3:.3g}k"


def test_the_bench_measures_a_toy(toy, capsys, monkeypatch):
    monkeypatch.setattr(
        bench, "race", lambda calls, *_: [(call(), 1.0)[1] for call in calls]
    )
    broken = Mock(side_effect=RuntimeError("no compiler"))
    monkeypatch.setattr(torch, "compile", lambda forward: broken)
    assert bench.main([str(toy), "--micro_batch_size=4", "--compile=on"]) == 0
    said, error = capsys.readouterr()
    table = {what: cells[0] for what, cells in rows(said).items()}
    peak, memory = map(int, re.findall(r"(\d+) MiB", table["peak memory, eager"]))
    assert abs(peak - memory) <= 1
    assert {"compiled step", "the final shape"} < table.keys()
    assert len(set(error.splitlines())) == 1 and "no compiler" in error


def test_the_bench_times_nanogpt_beside_a_step_of_its_size(
    toy, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        bench, "race", lambda calls, *_: [(call(), 0.5)[1] for call in calls]
    )
    (tmp_path / "model.py").write_text(NANOGPT)
    knobs = ["--d_model=24", "--n_head=4", "--n_kv_head=2", "--micro_batch_size=4"]
    assert bench.main([str(toy), "--nanogpt", str(tmp_path), *knobs]) == 0
    said = capsys.readouterr().out
    table = {what: cells[0] for what, cells in rows(said).items()}
    assert table["nanoGPT, eager, float32"] == "500.0 ms, 24,576 parameters"
    ours = int(
        re.findall("([0-9,]+) par", table["ours, eager, float32"])[0].replace(",", "")
    )
    assert "number of" not in said
    assert (
        ours == 24 * 1024 + 4 * (12 * 24**2 + 2 * 24) + 24
    )  # as many in a block as nanoGPT
