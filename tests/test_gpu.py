"""What only a GPU can show: python -m pytest -m gpu. Most tests also run on the CPU, with a toy.

A run that is repeated ends in the same bytes on a CPU, but on a GPU it may differ by rounding.
"""

import functools
import re

import pytest
import torch
from helpers import ROOT, events, run
from test_ranks import assert_close, torchrun

from model import KINDS
from run import machine
from run.config import micro_batch
from run.cost import memory_of
from run.read_config import load_config
from tools import bench
from tools.load import load_plan
from tools.plan import GPT2_VOCABULARY

# Of weights, moments and scores after a toy's run in float32. First weights that differ by a
# millionth of each lead to last ones that differ by up to 7e-5
TOLERANCE = 1e-3
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU here")
GPU = (pytest.mark.gpu, NO_GPU)
ALL = max(n for n in (1, 2, 4, 8) if n <= max(torch.cuda.device_count(), 1))  # the batch divides
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])


@pytest.fixture
def full_float32(monkeypatch):
    """Products of float32 matrices without TF32, here and in child processes."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)


@on_each_device
def test_in_bfloat16_a_run_ends_near_the_loss_of_float32(device, toy, undisturbed, tmp_path):
    """On a GPU: the default run, compiled, ends near the README's loss on a CPU."""
    config, loss = toy, events(undisturbed, "done")[0]["val_loss"]
    knobs = [f"--device={device}", "--dtype=bfloat16"]
    if device == "cuda":
        readme = (ROOT / "README.md").read_text()
        config, loss = "configs/idea.py", float(re.search(r"loss +(\S+) nats", readme)[1])
        knobs.append("--compile=on")
    assert run(config, tmp_path, *knobs) == 0
    assert events(tmp_path, "done")[0]["val_loss"] == pytest.approx(loss, abs=0.02)


@pytest.mark.usefixtures("full_float32")
@on_each_device
def test_all_kinds_are_pruned_as_on_the_cpu(device, toy, undisturbed, tmp_path):
    assert run(toy, tmp_path, f"--device={device}", "--micro_batch_size=4") == 0
    runs = (tmp_path, undisturbed)
    removed, expected = ([e["removed"] for e in events(out, "prune")] for out in runs)
    assert removed == expected
    assert_close(tmp_path, undisturbed, TOLERANCE)


@pytest.mark.usefixtures("full_float32")
@on_each_device
def test_a_compiled_run_has_one_graph_and_resumes_to_the_same_end(
    device, toy, tmp_path, monkeypatch
):
    if device == "cpu":  # no C++ compiler is needed
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    counters = torch._dynamo.utils.counters
    knobs = (f"--device={device}", "--compile=on", "--n_kv_head_target=2")
    for out, more in (("whole", ""), ("cut", "--stop_after=16"), ("cut", "--resume")):
        torch._dynamo.reset()  # what another process would know
        counters.clear()
        assert run(toy, tmp_path / out, *knobs, *more.split()) == 0
        assert counters["stats"]["unique_graphs"] == 1
    prunes = [(e["step"], e["kind"]) for e in events(tmp_path / "cut", "prune")]
    assert {kind for step, kind in prunes if step > 16} == set(KINDS)
    assert_close(tmp_path / "cut", tmp_path / "whole", 0 if device == "cpu" else TOLERANCE)


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("knobs", ["idea_gpt2.py --micro_batch_size=8", "idea_2.8b.py --n_layer=2"])
def test_a_step_takes_the_memory_that_was_planned(knobs):
    config, *knobs = knobs.split()
    c = load_config(f"configs/{config}", [*knobs, "--device=cuda"])
    c, plan = load_plan(c, missing=GPT2_VOCABULARY)
    planned = sum(memory_of(c, plan.enlarged, micro_batch(c, ranks=1)).values())
    device = machine.choose_device(c)
    if planned > 0.9 * machine.available_memory(device):
        pytest.skip(f"needs {planned / 1e9:.0f} GB of memory")
    assert bench.peak_memory(c, plan.enlarged, device) == pytest.approx(planned, rel=0.15)


@pytest.mark.gpu
@NO_GPU
@pytest.mark.usefixtures("full_float32")
def test_under_torchrun_a_run_stops_and_resumes_to_the_end_of_one(toy, tmp_path):
    for more in ("--stop_after=16", "--resume"):
        torchrun(toy, tmp_path / "run", "--device=cuda", more, ranks=ALL)
    assert run(toy, tmp_path / "one", "--device=cuda") == 0
    assert_close(tmp_path / "run", tmp_path / "one", TOLERANCE)
