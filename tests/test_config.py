import csv
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from test_readme import CONFIGS

from model import GPT
from run.config import (
    Config,
    ConfigError,
    check_memory,
    check_ranks,
    load_config,
    make_plan,
    match_flops,
    model_config,
    padded_vocab,
)
from run.machine import choose_compile
from tools.arms import load_arms
from tools.load import Run
from tools.sample import generate
from train import main

ROOT = Path(__file__).parent.parent
VOCAB = 1024
OTHER_SIZES = ("idea_12m", "idea_gpt2", "idea_2.8b", "smollm2")


def load(name: str, *overrides: str) -> Config:
    return load_config(str(ROOT / "configs" / f"{name}.py"), list(overrides))


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_loads_and_plans(name):
    c = match_flops(load(name), VOCAB)
    plan = make_plan(c, VOCAB)
    assert sum(steps for _, steps in plan.shapes) == c.max_steps
    assert c.out_dir == f"out/{name}"
    final, idea = plan.shapes[-1][0], make_plan(load("idea"), VOCAB).shapes[-1][0]
    assert (final == idea) == (name not in ("enlarged", *OTHER_SIZES))


def arms_of(results: str) -> list[str]:
    with open(ROOT / "results" / results / "runs.csv") as file:
        return sorted({row["arm"] for row in csv.DictReader(file)} - {"idea"})


LABORATORIES = {
    "compare": arms_of("main"),
    "ablations": arms_of("ablations"),
    "compare_gpu": ["enlarged", "naive", "oneshot", "scratch", "scratch_flops"],
}


@pytest.mark.parametrize("folder", LABORATORIES)
def test_every_laboratory_compares_what_can_be_compared(folder):
    base = "compare" if folder == "ablations" else folder
    paths = [f"configs/{folder}/{name}.py" for name in LABORATORIES[folder]]
    paths.append(f"configs/{base}/idea.py")
    arms = load_arms(paths, ["--data_dir=data/sotu"], "idea")  # raises where they cannot
    assert len(arms) == len(paths) > 5
    for arm in arms:
        changed = Path(arm.path).read_text().split("import *")[1].strip().splitlines()
        assert arm.name == "idea" or 1 <= len(changed) <= 4, arm.path


def test_plan_counts_the_flops_of_every_step():
    c = load("idea_attention")
    plan = make_plan(c, VOCAB)
    by_step = 0
    for step in range(1, c.max_steps + 1):
        width, kv = plan.schedule.width(step, 512, 176, 16), plan.schedule.width(step, 4, 2)
        shape = replace(plan.shapes[0][0], d_ff=[width] * 4, n_kv_head=[kv] * 4)
        by_step += c.batch_size * c.context_length * shape.flops_per_token()
    assert plan.flops == by_step < plan.enlarged_flops
    assert make_plan(load("idea", "--max_steps=1000000000000"), VOCAB).flops > 1e21
    assert [s.d_ff[0] for s, _ in plan.shapes] == sorted((s.d_ff[0] for s, _ in plan.shapes))[::-1]


@pytest.mark.parametrize("overrides", [(), ("--max_steps=160",)])
def test_scratch_flops_spends_what_idea_spends_to_within_one_step(overrides):
    idea, c = load("idea", *overrides), load("scratch_flops", *overrides)
    c = match_flops(c, VOCAB)
    plan = make_plan(c, VOCAB)
    assert c.max_steps > idea.max_steps
    assert abs(plan.flops - make_plan(idea, VOCAB).flops) < plan.flops / c.max_steps


def test_configs_differ_from_idea_by_the_lines_that_matter():
    differ = {
        name: {
            f.name
            for f in fields(Config)
            if getattr(load(name), f.name) != getattr(load("idea"), f.name)
        }
        - {"out_dir"}
        for name in CONFIGS
    }
    assert differ["oneshot"] == {"prune_start", "prune_schedule"}
    assert differ["naive"] == {"prune_start", "prune_schedule", "lr_restart"}
    assert differ["idea_paper"] == {"prune_start", "prune_end"}
    assert differ["scratch"] == {"d_ff", "d_ff_target", "learning_rate"}
    assert differ["enlarged"] == {"d_ff_target"}
    assert differ["scratch_flops"] == differ["scratch"] | {"match_flops"}


def test_command_line_overrides_the_file_with_the_type_of_the_knob():
    c = load("idea", "--max_steps=700", "--learning_rate=1", "--resume", "--compile=off")
    assert (c.max_steps, c.learning_rate, c.resume, c.compile) == (700, 1.0, True, "off")
    assert load("idea", "--resume=false", "--out_dir=1e3").out_dir == "1e3"


def test_a_shorter_run_is_shorter_in_all_that_counts_its_steps():
    c = load("idea", "--shorter=8", "--max_steps=2000", "--stop_after=90", "--log_every=3")
    assert (c.max_steps, c.warmup_steps, c.prune_every) == (250, 50 // 8, 20 // 8)
    assert (c.eval_every, c.save_every, c.log_every, c.stop_after) == (250 // 8, 250 // 8, 1, 90)
    assert load("idea", "--shorter=1") == load("idea")
    assert load("idea", "--shorter=2", "--warmup_steps=0").warmup_steps == 0
    equal = load("scratch_flops", "--shorter=8")  # its prunes are those of the other config
    assert equal.prune_every == c.prune_every and "shorter" not in vars(c)


BAD = {
    "unknown key": (["--d_ff_targt=3"], ["d_ff_targt", "d_ff_target"]),
    "a key like no other": (["--foo=3"], ["unknown key 'foo'; --help lists all\n"]),
    "not a number": (["--max_steps=abc"], ["max_steps", "abc", "int"]),
    "a float for an int": (["--max_steps=1e3"], ["max_steps", "1000.0", "int"]),
    "a text for a float": (["--learning_rate=high"], ["learning_rate", "high"]),
    "a number for a bool": (["--resume=3"], ["resume", "3", "bool"]),
    "not finite": (["--learning_rate=1e999"], ["learning_rate", "inf"]),
    "negative": (["--seed=-1"], ["seed", "-1"]),
    "zero": (["--batch_size=0"], ["batch_size", "0"]),
    "no value": (["--max_steps"], ["max_steps", "VALUE"]),
    "not so many times shorter": (["--shorter=0.5"], ["shorter='0.5'"]),
    "no times shorter": (["--shorter"], ["shorter=''"]),
    "no dashes": (["max_steps=3"], ["max_steps=3", "--key=value"]),
    "beta of one": (["--beta2=1.0"], ["beta2", "1.0"]),
    "floor above one": (["--min_lr_fraction=1.5"], ["min_lr_fraction", "1.5"]),
    "unknown choice": (["--criterion=taylor"], ["criterion", "taylor", "sensitivity"]),
    "window ends before it starts": (["--prune_end=0.05"], ["prune_end=0.05: ", "prune_start=0.1"]),
    "window past the end": (["--prune_end=1.0"], ["prune_end=1.0: "]),
    "window at the start": (["--prune_start=0.0"], ["prune_start", "0.0"]),
    "target wider than the model": (["--d_ff_target=1024"], ["d_ff_target", "1024", "512"]),
    "KV target wider": (["--n_kv_head_target=4"], ["n_kv_head_target", "4"]),
    "target off the grid": (["--d_ff_target=170"], ["d_ff_target", "170", "176", "round_to"]),
    "KV heads do not divide": (["--n_kv_head=3"], ["n_kv_head", "3", "n_head"]),
    "heads do not divide": (["--n_head=6"], ["n_head", "6", "d_model"]),
    "odd head": (["--head_dim=15"], ["head_dim", "15", "even"]),
    "micro batch does not divide": (["--micro_batch_size=7"], ["micro_batch_size", "7", "32"]),
    "restart with nothing to prune": (["--lr_restart", "--d_ff_target=0"], ["lr_restart"]),
    "no room for the window": (["--max_steps=2", "--warmup_steps=0"], ["max_steps", "2"]),
    "warm-up longer than the run": (["--warmup_steps=1000"], ["warmup_steps", "1000"]),
    "no room for one data window": (["--context_length=9000000"], ["context_length"]),
    "device that is not there": (["--device=mps"], ["device", "mps"]),
    "no such data": (["--data_dir=data/none"], ["data/none", "data.prepare"]),
    "missing checkpoint": (["--init_from=none.pt"], ["none.pt"]),
    "foreign checkpoint": (["--init_from=README.md"], ["README.md"]),
    "occupied by a file": (["--out_dir=README.md"], ["README.md"]),
    "FLOPs of a missing config": (["--d_ff_target=0", "--match_flops=x.py"], ["x.py"]),
    "FLOPs for a run that prunes": (["--match_flops=configs/scratch.py"], ["match_flops"]),
}  # fmt: skip


@pytest.mark.parametrize("overrides, words", BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line_and_exit_code_2_with_nothing_written(
    overrides, words, tmp_path, capsys
):
    out = tmp_path / "run"
    code = main(["configs/idea.py", f"--out_dir={out}", "--device=cpu", *overrides])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not out.exists()


def test_a_batch_that_the_ranks_do_not_divide_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["configs/idea.py", f"--out_dir={tmp_path / 'out'}"]) == 2
    assert "batch_size=32: must divide by the 3 ranks" in capsys.readouterr().err
    c = load("scratch_flops", "--batch_size=48")  # that of the other config is no matter
    check_ranks(match_flops(c, VOCAB), 3)
    with pytest.raises(ConfigError, match="micro_batch_size=32: must divide the 16 sequences"):
        check_ranks(load("scratch", "--batch_size=64", "--micro_batch_size=32"), 4)


def test_memory_counts_what_shared_moments_and_recomputed_activations_save(monkeypatch):
    knobs = ["--d_ff=6144", "--d_ff_target=0"]
    c = load("idea_2.8b", *knobs)
    assert c.shard_optimizer and c.recompute
    monkeypatch.setenv("WORLD_SIZE", "64")
    check_memory(replace(c, micro_batch_size=8), 50304, 24 * 10**9)
    for key in ("shard_optimizer", "recompute"):
        without = replace(c, **{key: False}, micro_batch_size=8)
        with pytest.raises(ConfigError, match="needs at least"):
            check_memory(without, 50304, 24 * 10**9)


@pytest.mark.parametrize(
    "text, words",
    [
        ("d_fff = 3", ["d_fff", "d_ff"]),
        ("d_ff = '3'", ["d_ff", "'3'", "int"]),
        ("d_ff = [3, 4]", ["d_ff", "int"]),
        ("d_ff = ", ["SyntaxError"]),
        ("1 / 0", ["ZeroDivisionError"]),
        ("from configs.none import *", ["ModuleNotFoundError"]),
    ],
)
def test_bad_config_files_end_in_one_line(text, words, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(str(path))
    assert all(word in str(error.value) for word in [str(path), *words])
    assert "\n" not in str(error.value)


def test_help_lists_every_knob_with_its_default(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for field in fields(Config):
        assert f"{field.name}: " in text
    assert main([]) == 2


def test_compiling_on_a_cpu_without_a_compiler_is_refused_and_auto_stays_eager(monkeypatch):
    monkeypatch.setattr("run.machine.shutil.which", lambda name: None)
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match="compile='on'.*g\\+\\+.*--compile=off"):
        choose_compile(load("idea", "--compile=on"), cpu, 1e18)
    assert not choose_compile(load("idea"), cpu, 1e18)


def test_a_padded_vocabulary_is_counted_and_never_sampled():
    c = load("idea", "--round_vocab_to=4096")
    assert padded_vocab(c, 1024) == 4096 and padded_vocab(load("idea"), 1023) == 1023
    assert make_plan(c, padded_vocab(c, 1024)).shapes[0][0].vocab_size == 4096
    model = GPT(model_config(c, 4096)).eval()
    torch.nn.init.zeros_(model.embed.weight[:1000])  # all ids alike but those past 1000
    run = Run(model, None, 1000, 999, model.config)
    drawn = generate(run, [5], 40, 1.0, 0, 1.0, torch.Generator().manual_seed(1))
    tokens = list(drawn)
    assert 10 < len(tokens) <= 40
    assert max(tokens) < 1000
