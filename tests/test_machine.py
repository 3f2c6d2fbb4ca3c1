"""What another machine has or lacks: a run does without it, or one line says so."""

import os
from unittest.mock import Mock

import pytest
import torch
from helpers import events, run

from model import KINDS, tune_cpu

NEVER_PRUNED = [f"--{kind}_target=0" for kind in KINDS]
# So many steps that compiling them would pay; the run stops after the first one
LONG = ["--max_steps=10000000", "--stop_after=1"]
COMPILES = {
    "a long run": (LONG + NEVER_PRUNED, True),
    "KV heads": ([*LONG, "--prune_schedule=oneshot"], False),
    "a short run": (["--stop_after=1"], False),
}


@pytest.fixture
def compute(toy, tmp_path, monkeypatch):
    """Runs a step and returns the device, the dtype and "eager" or "compiled"."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def first_step(*knobs: str) -> str:
        assert run(toy, tmp_path, "--overwrite", "--stop_after=1", *knobs) == 0
        return events(tmp_path, "start")[0]["compute"]

    return first_step


@pytest.mark.parametrize("knobs, compiles", COMPILES.values(), ids=COMPILES)
def test_auto_compiles_long_runs_on_a_cpu(knobs, compiles, compute, monkeypatch):
    compiled = Mock(side_effect=lambda function: function)
    monkeypatch.setattr(torch, "compile", compiled)
    compiles = compiles and os.name != "nt"  # Windows seldom has a compiler
    expected = "compiled" if compiles else "eager"
    assert compute("--compile=auto", *knobs) == f"cpu, float32, {expected}"
    assert compiled.called == compiles


def test_if_compiling_fails_a_run_is_eager(compute, monkeypatch, capsys):
    broken = Mock(side_effect=RuntimeError("no Python.h\nin sight"))
    monkeypatch.setattr(torch, "compile", lambda eager: broken)
    assert compute("--compile=on") == "cpu, float32, eager"
    line = "goes on without it: RuntimeError: no Python.h in sight\n"
    assert capsys.readouterr().out.count(line) == 1
    broken.assert_called_once()


def test_small_steps_take_one_thread(compute, monkeypatch):
    set_threads = Mock()
    monkeypatch.setattr(torch, "set_num_threads", set_threads)
    compute()  # OMP_NUM_THREADS is set
    monkeypatch.delenv("OMP_NUM_THREADS")
    tune_cpu(step_flops=1e12)
    set_threads.assert_not_called()
    compute()
    set_threads.assert_called_once_with(1)


@pytest.mark.parametrize("supported, dtype", [(True, "bfloat16"), (False, "float32")])
def test_auto_is_bfloat16_where_the_cpu_has_it(supported, dtype, compute, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    assert compute("--device=auto", "--dtype=auto") == f"cpu, {dtype}, eager"


def test_mps_takes_one_process_in_float32(toy, compute, refused, monkeypatch):
    """In bfloat16, attention on MPS sees later tokens."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    half = "--dtype=bfloat16"
    assert compute("--device=auto", half) == "cpu, bfloat16, eager"
    refused("device=mps", toy, "--device=mps", half)
    refused("device=cuda", toy, "--device=cuda")
    monkeypatch.setenv("WORLD_SIZE", "1")
    refused("device=mps", toy, "--device=mps")
