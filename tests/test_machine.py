"""What a first GPU, or another system, may lack: one line says so, or the run does without."""

from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from helpers import run
from test_ranks import assert_close

import train
from data.command import UserError
from run import forward, machine
from run.config import Config, load_config
from run.cost import Plan

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def laptop(monkeypatch):
    def laptop(system: str = "posix", has_gpu: bool = True, **variables) -> None:
        for module in (machine, forward):
            monkeypatch.setattr(module, "os", SimpleNamespace(name=system, environ=variables))
        for name, value in (("is_available", has_gpu), ("device_count", 1), ("set_device", None)):
            monkeypatch.setattr(torch.cuda, name, Mock(return_value=value))

    return laptop


def test_auto_compiles_on_a_gpu_and_long_runs_on_a_cpu_but_not_on_windows(laptop):
    short, long = Config(), Config(max_steps=10**6)
    cases = [("posix", GPU, short, True), ("posix", CPU, short, False), ("posix", CPU, long, True)]
    for system, device, c, compiles in (*cases, ("nt", CPU, long, False), ("nt", GPU, long, False)):
        laptop(system)
        assert forward.choose_compile(c, device, Plan(c, vocab_size=1024)) == compiles


@pytest.mark.parametrize("fails", ["here", "on another rank"])
def test_if_compiling_fails_a_run_is_eager(fails, toy, undisturbed, tmp_path, monkeypatch, capsys):
    def average_numbers(self, *own, average=train.Machine.average_numbers) -> list[float]:
        return [0.5] if len(own) == 1 and fails == "on another rank" else average(self, *own)

    broken = Mock(side_effect=RuntimeError("no Python.h"))
    monkeypatch.setattr(torch, "compile", lambda eager: broken if fails == "here" else eager)
    monkeypatch.setattr(train.Machine, "average_numbers", average_numbers)
    assert run(toy, tmp_path, "--compile=on") == 0
    said, error = capsys.readouterr()
    why = "RuntimeError: no Python.h" if fails == "here" else fails
    assert error == f"compiling failed, so the run goes on without it: {why}\n"
    assert "float32, eager" in said
    assert_close(tmp_path, undisturbed, 0)


def test_small_steps_take_one_thread_unless_the_environment_says_how_many(laptop, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", told := Mock())
    plans = [Plan(load_config(f"configs/{name}.py"), 1024) for name in ("idea", "idea_12m")]
    small, large = (plan.flops(1) for plan in plans)
    said = {"OMP_NUM_THREADS": "2"}
    for device, flops, variables in ((CPU, large, {}), (GPU, small, {}), (CPU, small, said)):
        laptop(**variables)
        machine.Machine.choose_threads(SimpleNamespace(device=device), flops)
    told.assert_not_called()
    laptop()
    machine.Machine.choose_threads(SimpleNamespace(device=CPU), small)
    told.assert_called_once_with(1)


def test_free_memory_and_a_container_s_limit_count(laptop, tmp_path, monkeypatch):
    laptop()  # it has no sysconf
    c = load_config("configs/idea_gpt2.py", ["--dtype=bfloat16"])
    plan = Plan(c, 50257)  # needs 25.1 GiB a rank
    here = SimpleNamespace(device=CPU, ranks=1)
    machine.check_memory(c, plan, 1, here)
    machine.os.sysconf = {"SC_PAGE_SIZE": 2**30, "SC_PHYS_PAGES": 100}.get
    monkeypatch.setattr(machine, "LIMITS", [limit := tmp_path / "memory.max", tmp_path / "none"])
    none, little = nullcontext(), pytest.raises(UserError, match="cpu, which has 25.0")
    for content, ranks, end in (("max", 1, none), (25 * 2**30, 1, little), ("max", 4, little)):
        limit.write_text(f"{content}\n")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))  # which share it
        here.ranks = ranks
        with end:
            machine.check_memory(c, plan, 1, here)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**30)  # by this process
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * 2**30, 80 * 2**30))
    with pytest.raises(UserError, match="cuda, which has 7.0"):
        machine.check_memory(c, plan, 1, SimpleNamespace(device=GPU, ranks=1))


def test_mps_is_never_chosen_and_takes_one_process_in_float32(laptop, monkeypatch):
    laptop(has_gpu=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert machine.choose_device(Config()) == CPU
    alone = Config(device="mps")
    assert machine.choose_dtype(alone, machine.choose_device(alone)) == torch.float32
    for dtype, variables in (("bfloat16", {}), ("float32", {"WORLD_SIZE": "1"})):
        laptop(has_gpu=False, **variables)
        with pytest.raises(UserError, match="device='mps'"):
            machine.choose_device(Config(device="mps", dtype=dtype))
