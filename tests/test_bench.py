"""The plan against what really happens, and the bench on a toy."""

import functools
import locale
from itertools import accumulate

import pytest
import torch
from helpers import events, run
from test_model import shapes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from configs import load_config
from data.command import UserError
from model import GPT, recompute_blocks
from tools import bench, plan

LARGE = [
    ["--round_vocab_to=2048", "--dtype=bfloat16"],
    ["--d_ff=2048", "--compile=on"],
    ["--d_ff=2048", "--recompute=cheap", "--compile=on"],
    ["--n_head=16", "--n_kv_head=8", "--recompute=all", "--optimizer=adamw"],
]
# What is used here of nanoGPT's model.py
NANOGPT = """import torch, types
GPTConfig = types.SimpleNamespace
class GPT(torch.nn.Embedding):
    def __init__(self, config):
        print("number of parameters")
        super().__init__(config.vocab_size, config.n_embd)
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas)
    def forward(self, tokens, targets):
        return None, super().forward(tokens).mean()
"""


@pytest.mark.parametrize("knobs", LARGE, ids=" ".join)
def test_the_planned_memory_is_what_a_run_takes(knobs, toy, tmp_path, monkeypatch):
    utf8 = "utf" in locale.getpreferredencoding(False).lower()
    if "--compile=on" in knobs and not utf8:
        pytest.skip("torch's compiler reads its own UTF-8 files by the locale")
    # This backend keeps what Inductor keeps, but needs no compiler
    backend = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", backend)
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")  # the profiler talks to stderr
    size = ["--n_layer=3", "--d_model=64", "--head_dim=16", "--context_length=64"]
    size += ["--optimizer=muon", "--batch_size=32", "--micro_batch_size=16"]
    targets = [f"--{kind}_target=0" for kind in plan.KINDS]
    knobs = [*size, *targets, "--max_steps=4", "--eval_tokens=1", *knobs]
    with torch.profiler.profile(profile_memory=True) as profile:
        assert run(toy, tmp_path, *knobs) == 0
    found = profile.profiler.kineto_results.events()
    changes = [event for event in found if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    peak = max(accumulate(event.nbytes() for event in changes))
    config, planned = plan.load_plan(load_config(str(toy), knobs)[0])
    memory = plan.memory_of(config, planned.enlarged, config.micro_batch_size)
    assert memory == pytest.approx(peak, rel=0.1)


@shapes
def test_the_plan_counts_the_work_that_torch_counts(config):
    model = GPT(config)
    recompute_blocks(model, "all")
    muon = torch.optim.Muon(p for p in model.blocks.parameters() if p.dim() == 2)
    tokens = torch.zeros(4, 12, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    # Eager blocks would stop before the last product, because nobody needs it
    with sdpa_kernel(SDPBackend.MATH), set_checkpoint_early_stop(False), counter:
        model(tokens, tokens).backward()
        muon.step()
    planned = 4 * 12 * (config.flops_per_token() + plan.block_flops(config))
    planned += plan.muon_flops(config)
    assert counter.get_total_flops() == planned


def rows(capsys, main, *arguments: object) -> dict[str, list[str]]:
    """The table that a command prints: first cell -> the others."""
    assert main([str(argument) for argument in arguments]) == 0
    table = {}
    for line in capsys.readouterr().out.splitlines():
        name, *cells = line.strip("| ").split(" | ")
        table[name] = cells
    return table


def test_the_plan_says_what_the_big_run_costs_and_what_fits(capsys, refused):
    def planned(*knobs):
        return rows(capsys, plan.main, "configs/idea_2.8b.py", *knobs)

    table = planned("--gpus=64")
    assert table["enlarged"][:4] == ["2.82B", "1.00T", "81%", "1.81e+22"]
    assert table["recover"][:4] == ["1.31B", "500B", "3%", "4.54e+21"]
    assert table["enlarged"][-1] == "yes"
    hours = float(table["the run"][5])
    for slower in ("--recompute=all", "--micro_batch_size=2", "--optimizer=muon"):
        assert float(planned("--gpus=64", slower)["the run"][5]) > hours
    huge = planned("--batch_size=1000000000000", "--micro_batch_size=0")
    assert huge["enlarged"][-1] == "no; --micro_batch_size=5 --recompute=cheap"
    assert planned("--gpu=4090")["enlarged"][-1] == "no; not one sequence fits"
    too_many = ["configs/idea_2.8b.py", "--gpus=1024"]
    refused("micro_batch_size=4: must divide", *too_many, main=plan.main)


def test_the_plan_is_for_the_run_that_train_makes(toy, undisturbed, tmp_path):
    knobs = [f"--teacher={undisturbed}", "--max_steps=20"]
    assert run(toy, tmp_path, *knobs) == 0
    _, planned = plan.load_plan(load_config(str(toy), knobs)[0])
    (done,) = events(tmp_path, "done")
    assert planned.flops() == done["flops"]
    assert planned.final.n_params() == done["params"]
    knobs = [f"--{kind}_target=0" for kind in plan.KINDS]
    knobs.append(f"--init_from={undisturbed}")
    _, planned = plan.load_plan(load_config(str(toy), knobs)[0], missing=7)
    assert planned.enlarged.n_params() == events(undisturbed, "done")[0]["params"]
    missing = load_config("configs/idea_gpt2.py")[0]
    assert plan.load_plan(missing, missing=50_257)[1].enlarged.vocab_size == 50_304
    with pytest.raises(UserError, match="data/fineweb"):
        plan.load_plan(missing)


def test_the_bench_times_a_run_of_one_shape_and_kills_it(toy, tmp_path, monkeypatch):
    seen = []

    def after_30_steps(steps):
        seen[:] = steps
        return len(steps) > 30

    monkeypatch.setattr(bench, "is_enough", after_30_steps)
    monkeypatch.setattr(bench, "TURNS", 1)
    monkeypatch.setattr(bench, "by_threads", lambda eager: [])
    monkeypatch.setattr(bench, "measured_peak", lambda *device: 1e9)
    config, planned = plan.load_plan(load_config(str(toy))[0])
    planned.enlarged = planned.final
    table = dict(bench.measure(str(toy), ["--micro_batch_size=4"], config, planned))
    assert table["step"].endswith("cpu, float32, eager")
    assert {step["params"] for step in seen} == {planned.final.n_params()}
    failing = tmp_path / "train.py"
    failing.write_text("raise SystemExit('warning\\nerror: no data')")
    monkeypatch.setattr(bench, "TRAIN", failing)
    with pytest.raises(UserError, match="^train.py: no data$"):
        bench.time_run(bench.Variant([]))


@pytest.mark.parametrize("compiler", ["compiled", "eager"])
def test_the_bench_compares_medians_and_says_if_compiling_failed(
    compiler, toy, capsys, monkeypatch
):
    turns = iter([1, 1, 1, 90, 90, 90, *[1] * 99])  # the second turn is an outlier

    def time_run(variant):
        is_compiled = "--compile=on" in variant.arguments[-1]
        speed = 1000 + 1000 * is_compiled + 250 * ("--d_ff=8" in variant.arguments)
        speed /= 1 + variant.beside_busy_process
        mode = compiler if is_compiled else "eager"
        return speed * next(turns), f"cpu, float32, {mode}"

    monkeypatch.setattr(bench, "time_run", time_run)
    monkeypatch.setattr(bench, "measured_peak", lambda *device: 1e9)
    table = rows(capsys, bench.main, toy, "--compile=on")
    assert table["step"] == ["128.0 ms, 1,000 tokens/s, cpu, float32, eager"]
    assert table["the final shape"][0].startswith("20% less time, ")
    assert ["1,000; 500 (ratio 0.50)"] in table.values()
    if compiler == "eager":
        assert "compiling failed" in table
        assert "compiled" not in table
    else:
        assert table["compiled"][0].startswith("2.00 times as fast, ")


def test_the_bench_times_nanogpt_beside_ours(toy, tmp_path, capsys, monkeypatch):
    def race(calls, turns):
        for call in calls:
            call()
        return [0.5, 0.25]

    monkeypatch.setattr(bench, "race", race)
    (tmp_path / "model.py").write_text(NANOGPT)
    knobs = ["--d_model=24", "--d_model_target=0", "--n_head=4", "--n_kv_head=2"]
    table = rows(capsys, bench.main, toy, f"--nanogpt={tmp_path}", *knobs)
    assert table["nanoGPT, eager, float32"] == ["500.0 ms, 24,576 parameters"]
    # As many in a block as nanoGPT has
    n_params = 24 * 1024 + 4 * (12 * 24**2 + 2 * 24) + 24
    assert table["ours, eager, float32"] == [f"250.0 ms, {n_params:,} parameters"]
