"""What only a GPU can show: python -m pytest -m gpu. There, equal runs may differ by rounding."""

import functools
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, events, run
from test_ranks import assert_close

from model import KINDS
from run.config import CHOICES, load_config, micro_batch
from run.cost import memory_of
from run.machine import Machine
from tools import bench, load_plan
from tools.plan import GPT2_VOCABULARY

# In float32, weights that differ by a millionth of each at first differ by up to 7e-5 at last
TOLERANCE = 1e-3
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU here")
GPU = pytest.param("cuda", marks=(pytest.mark.gpu, NO_GPU))
on_a_gpu = pytest.mark.parametrize("device", [GPU])
ALL = max(n for n in (1, 2, 4, 8) if n <= max(torch.cuda.device_count(), 1))  # the batch divides


@pytest.fixture
def full_float32(monkeypatch):
    """Products of float32 matrices without TF32, here and in child processes."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)


@on_a_gpu
def test_the_default_run_in_bfloat16_ends_near_the_loss_of_the_readme(device, tmp_path):
    loss = float(re.search(r"loss +(\S+) nats", (ROOT / "README.md").read_text("utf-8"))[1])
    knobs = (f"--device={device}", "--dtype=bfloat16", "--compile=on")
    assert run("configs/idea.py", tmp_path, *knobs) == 0
    assert events(tmp_path, "done")[0]["val_loss"] == pytest.approx(loss, abs=0.02)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("recompute", CHOICES["recompute"])
def test_a_compiled_run_has_one_graph_for_all_blocks_and_ends_like_one_on_the_cpu_that_is_not(
    recompute, device, full_float32, toy, tmp_path, monkeypatch
):
    if device == "cpu":  # no C++ compiler is needed
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    knobs = ("--shorter=3", "--n_kv_head_target=2", f"--recompute={recompute}")
    assert run(toy, eager, *knobs) == 0
    torch._dynamo.reset()  # what another process would know
    torch._dynamo.utils.counters.clear()
    assert run(toy, compiled, *knobs, f"--device={device}", "--compile=on") == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # and one for the head
    prunes = [[(e["kind"], e["removed"]) for e in events(o, "prune")] for o in (eager, compiled)]
    assert prunes[0] == prunes[1] and {kind for kind, _ in prunes[0]} == set(KINDS)
    assert_close(compiled, eager, 0 if device == "cpu" else TOLERANCE)


@on_a_gpu
@pytest.mark.parametrize("knobs", ["idea_gpt2.py --micro_batch_size=8", "idea_2.8b.py --n_layer=2"])
@pytest.mark.parametrize("compile", ["off", "on"])
def test_a_step_takes_the_memory_that_was_planned(device, compile, knobs):
    config, *knobs = knobs.split()
    c = load_config(f"configs/{config}", [*knobs, f"--device={device}", f"--compile={compile}"])
    c, plan = load_plan(c, missing=GPT2_VOCABULARY)
    planned = sum(memory_of(c, plan.enlarged, micro_batch(c, ranks=1)).values())
    machine = Machine(c)
    if planned > 0.9 * torch.cuda.mem_get_info(machine.device)[0]:
        pytest.skip(f"needs {planned / 1e9:.0f} GB of memory")
    assert bench.peak_memory(c, plan.enlarged, machine) == pytest.approx(planned, rel=0.15)


@on_a_gpu
def test_torchrun_resumes_to_the_end_on_a_cpu(device, full_float32, toy, undisturbed, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ALL}"]
    command = [sys.executable, *launcher, "train.py", toy, f"--out_dir={tmp_path / 'run'}"]
    for more in ("--stop_after=16", "--resume"):
        subprocess.run([*command, f"--device={device}", more], cwd=ROOT, check=True)
    assert_close(tmp_path / "run", undisturbed, TOLERANCE)
