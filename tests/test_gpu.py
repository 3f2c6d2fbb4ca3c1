"""What only a GPU can show: python -m pytest -m gpu. Equal runs may differ there."""

import functools
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, events, run
from test_ranks import assert_close

from model import KINDS

# In float32, weights that differ by a millionth at first differ by up to 7e-5 at last
TOLERANCE = 1e-3
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
GPU = pytest.param("cuda", marks=(pytest.mark.gpu, NO_GPU))
on_a_gpu = pytest.mark.parametrize("device", [GPU])


@pytest.fixture
def full_float32(monkeypatch):
    """Products of float32 matrices without TF32, here and in child processes."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)


@on_a_gpu
def test_the_default_run_in_bfloat16_ends_near_the_loss_of_the_readme(device, tmp_path):
    readme = (ROOT / "README.md").read_text("utf-8")
    loss = float(re.search(r"loss +(\S+) nats", readme)[1])
    knobs = (f"--device={device}", "--dtype=bfloat16", "--compile=on")
    assert run("configs/idea.py", tmp_path, *knobs) == 0
    assert events(tmp_path, "done")[0]["val_loss"] == pytest.approx(loss, abs=0.02)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_compiled_run_has_one_graph_for_all_widths_and_ends_like_an_eager_one(
    device, full_float32, toy, tmp_path, monkeypatch
):
    if device == "cpu":  # no C++ compiler is needed
        eager_backend = functools.partial(torch.compile, backend="eager")
        monkeypatch.setattr(torch, "compile", eager_backend)
    eager = tmp_path / "eager"
    compiled = tmp_path / "compiled"
    knobs = ["--shorter=3", "--n_kv_head_target=2", "--recompute=cheap"]
    assert run(toy, eager, *knobs) == 0
    torch._dynamo.reset()  # what another process would know
    torch._dynamo.utils.counters.clear()
    knobs += [f"--device={device}", "--compile=on"]
    assert run(toy, compiled, *knobs) == 0
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 2  # one for the blocks and one for the head
    prunes = events(compiled, "prune")
    removed = [e["removed"] for e in events(eager, "prune")]
    assert [e["removed"] for e in prunes] == removed
    assert {e["kind"] for e in prunes} == set(KINDS)
    assert_close(compiled, eager, 0 if device == "cpu" else TOLERANCE)


@on_a_gpu
def test_torchrun_resumes_to_the_end_on_a_cpu(
    device, full_float32, toy, undisturbed, tmp_path
):
    out = tmp_path / "run"
    ranks = max(n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc_per_node={ranks}", "train.py"]
    command += [toy, f"--out_dir={out}", f"--device={device}"]
    for more in ("--stop_after=16", "--resume"):
        subprocess.run([*command, more], cwd=ROOT, check=True)
    assert_close(out, undisturbed, TOLERANCE)
