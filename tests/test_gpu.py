"""What only a GPU can show: python -m pytest -m gpu. Each test also runs on the CPU, with a toy.

A run that is repeated ends in the same bytes on a CPU, but on a GPU it may differ by rounding.
"""

import functools
import re
from pathlib import Path

import pytest
import torch
from helpers import ROOT, events, run, same_end
from test_ranks import assert_close, torchrun

from data.tokenizer import load_tokenizer
from model import KINDS
from run import machine
from run.config import micro_batch
from run.cost import memory_of
from run.read_config import load_config
from tools import bench, export
from tools.load import load_plan, load_trained
from tools.plan import GPT2_VOCABULARY

# Of weights, moments and scores after a toy's run in float32. First weights that differ by a
# millionth of each lead to last ones that differ by up to 7e-5
TOLERANCE = 1e-3
GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU here"),
)
CARDS = torch.cuda.device_count()
SEVERAL = pytest.mark.skipif(CARDS == 1, reason="there is only one GPU here")
ALL = max(n for n in (1, 2, 4, 8) if n <= max(CARDS, 1))  # so many share the toy's batch
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])


@pytest.fixture
def full_float32(monkeypatch):
    """Products of float32 matrices without TF32, here and in child processes."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)


def assert_same_end(a: Path, b: Path, device: str) -> None:
    if device == "cpu":
        assert same_end(a, b)
    else:
        assert_close(a, b, TOLERANCE)


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
@pytest.mark.parametrize("taught", [False, True])
@on_each_device
def test_a_compiled_run_has_one_graph_and_resumes_to_the_same_end(
    device, taught, toy, undisturbed, tmp_path, monkeypatch
):
    if device == "cpu":  # no C++ compiler is needed
        monkeypatch.setattr(machine, "missing_to_compile", lambda device: "")
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    counters = torch._dynamo.utils.counters
    knobs = (f"--device={device}", "--compile=on", "--n_kv_head_target=2")
    knobs += (f"--teacher={undisturbed}",) if taught else ()
    for out, more in (("whole", ""), ("cut", "--stop_after=16"), ("cut", "--resume")):
        torch._dynamo.reset()  # what another process would know
        counters.clear()
        assert run(toy, tmp_path / out, *knobs, *more.split()) == 0
        assert counters["stats"]["unique_graphs"] == 1
    prunes = [(e["step"], e["kind"]) for e in events(tmp_path / "cut", "prune")]
    assert {kind for step, kind in prunes if step > 16} == set(KINDS)
    assert_same_end(tmp_path / "cut", tmp_path / "whole", device)


@pytest.mark.parametrize(
    "device, config, knobs",
    [
        ("cpu", "idea", ["--micro_batch_size=1", "--n_layer=1", "--dtype=float32"]),
        pytest.param("cuda", "idea_gpt2", ["--micro_batch_size=8"], marks=GPU),
        pytest.param("cuda", "idea_2.8b", ["--n_layer=2"], marks=GPU),
    ],
)
def test_a_step_takes_the_memory_that_was_planned(device, config, knobs):
    c = load_config(f"configs/{config}.py", [*knobs, f"--device={device}"])
    c, plan = load_plan(c, missing=GPT2_VOCABULARY)
    device = machine.choose_device(c)
    dtype = machine.choose_dtype(c, device)
    planned = sum(memory_of(c, plan.enlarged, micro_batch(c, ranks=1), dtype).values())
    if planned > 0.9 * machine.available_memory(device):
        pytest.skip(f"needs {planned / 1e9:.0f} GB of memory")
    assert bench.peak_memory(c, plan.enlarged, device) == pytest.approx(planned, rel=0.15)


@pytest.mark.usefixtures("full_float32")
@pytest.mark.parametrize(
    "device, ranks",
    [
        pytest.param("cpu", 1, marks=pytest.mark.slow),
        pytest.param("cuda", 1, marks=GPU),
        pytest.param("cuda", ALL, marks=[*GPU, SEVERAL]),
    ],
)
def test_under_torchrun_a_run_stops_and_resumes_to_the_end_of_one(device, ranks, toy, tmp_path):
    knobs = [f"--device={device}"]
    for more in ("--stop_after=16", "--resume"):
        torchrun(toy, tmp_path / "run", *knobs, more, ranks=ranks)
    assert run(toy, tmp_path / "one", *knobs) == 0
    assert_same_end(tmp_path / "run", tmp_path / "one", device)


@pytest.mark.usefixtures("full_float32")
@on_each_device
def test_transformers_continues_a_text_as_our_model_would(device, undisturbed, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert export.main([str(undisturbed), f"--to={tmp_path / 'hf'}"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").to(device)
    start = load_tokenizer("shipped").encode_ordinary("The sum of")
    prompt = torch.tensor([start], device=device)
    tokens = theirs.generate(prompt, max_new_tokens=16 - len(start), do_sample=False)
    with torch.no_grad():
        logits = load_trained(undisturbed).model.to(device)(tokens[:, :-1])[:, len(start) - 1 :]
    chosen = logits.gather(-1, tokens[:, len(start) :, None]).squeeze(-1)
    torch.testing.assert_close(chosen, logits.amax(-1), rtol=0, atol=0.01)
