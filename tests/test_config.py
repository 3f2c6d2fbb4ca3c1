"""Knobs: what could not be a run is refused in one line, before anything is written."""

import zipfile
from dataclasses import fields
from pathlib import Path

import pytest
from helpers import train

from configs import Config, load_config

# What somebody types, and what the line of the error names
BAD_KNOBS = {
    "--d_ff_targt=3": "unknown key 'd_ff_targt'; the nearest is 'd_ff_target'",
    "--criterion=taylor": "criterion='taylor': must be one of sensitivity",
    "--prune_schedule=line": "prune_schedule='line'",
    "--d_ff_target=10": "d_ff_target=10: must be a multiple of round_to=4",
    "--d_ff_target=64": "d_ff_target=64: must be 0 to d_ff=32",
    "--max_steps=ten": "max_steps='ten' is not of type int",
    "--resume=2": "resume=2 is not of type bool",
    "--max_steps": "'--max_steps' is not of the form --key=value",
    "max_steps=3": "'max_steps=3' is not of the form --key=value",
    "--max_steps=0": "max_steps=0: must be greater than 0",
    "--seed=-1": "seed=-1: must be 0 or more",
    "--learning_rate=nan": "learning_rate=",
    "--learning_rate=-1": "learning_rate=-1.0",
    "--n_kv_head=3": "n_kv_head=3: must divide n_head=4",
    "--n_head=16": "head_dim=0: must be even",
    "--micro_batch_size=3": "micro_batch_size=3: must divide a rank's 8 sequences",
    "--context_length=1000000": "context_length + 1 = 1,000,001",
    "--data_dir=data/none": "data/none: no such folder; make it",
    "--init_from=configs/idea.py": "idea.py: damaged, or no checkpoint",
    "--teacher=out/none": "out/none: no such checkpoint",
    "--stop_after=30": "stop_after=30: must come before max_steps=30",
    "--shorter=0": "shorter=0: must be 1, 2, 3",
    "--out_dir=configs/idea.py": "out_dir=configs/idea.py: cannot write there",
    "--resume --overwrite": "overwrite=True: contradicts resume",
}
BAD_FILES = {
    "d_ff_targt = 3": "unknown key 'd_ff_targt'",
    "max_steps = '3'": "max_steps='3' is not of type int",
    "max_steps = 3 +": "SyntaxError",
    "from configs.none import *": "ModuleNotFoundError",
    "max_steps = seed": "NameError",
}


@pytest.mark.parametrize("knobs", BAD_KNOBS)
def test_a_bad_knob_ends_in_one_line_that_names_it(knobs, toy, tmp_path, refused):
    out = tmp_path / "run"
    refused(BAD_KNOBS[knobs], toy, f"--out_dir={out}", *knobs.split())
    assert not out.exists()


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_file_ends_in_one_line_that_names_it(text, tmp_path, refused):
    config = tmp_path / "mine.py"
    config.write_text(text)
    out = tmp_path / "run"
    refused(f"{config}: {BAD_FILES[text]}", config, f"--out_dir={out}")
    assert not out.exists()


def test_what_is_no_config_is_refused(tmp_path, refused):
    refused("no config given")
    checkpoint = tmp_path / "checkpoint.pt"
    with zipfile.ZipFile(checkpoint, "w") as archive:
        archive.writestr("__main__.py", "1 / 0")  # Python would run it
    for path in (tmp_path, tmp_path / "none.py", checkpoint):
        refused(f"{path}: no config", path, f"--out_dir={tmp_path / 'run'}")
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_a_config_may_start_from_another_and_keep_names_of_its_own(
    tmp_path, monkeypatch
):
    config = tmp_path / "mine.py"
    lines = ["from configs.idea import *", "import math", "_half = max_steps // 2"]
    lines += ["max_steps = _half", "learning_rate = 1", "data_dir = '~/data'"]
    config.write_text("\n".join(lines))
    for home in ("HOME", "USERPROFILE"):  # an account may have none
        monkeypatch.setenv(home, str(tmp_path))
    mine, given = load_config(str(config), ["--seed=3", "--overwrite"])
    idea, _ = load_config("configs/idea.py")
    assert mine.out_dir == "out/mine"
    assert (mine.max_steps, mine.d_ff) == (idea.max_steps // 2, idea.d_ff)
    assert mine.learning_rate == 1.0
    assert Path(mine.data_dir) == tmp_path / "data"
    assert given == {"seed": 3, "overwrite": True}


def test_a_shorter_run_is_shorter_in_all_that_counts_its_steps(undisturbed, refused):
    def load(*knobs: str) -> Config:
        return load_config("configs/idea.py", knobs)[0]

    config = load("--shorter=8", "--max_steps=2000", "--stop_after=90", "--log_every=3")
    assert (config.max_steps, config.stop_after) == (250, 90)
    assert (config.warmup_steps, config.prune_every) == (100 // 8, 100 // 8)
    assert (config.eval_every, config.save_every) == (500 // 8, 1000 // 8)
    assert config.log_every == 3
    assert load("--shorter=8").log_every == 500 // 20  # 20 lines
    assert load("--shorter=1") == load()
    assert load("--shorter=2", "--warmup_steps=0").warmup_steps == 0
    refused("shorter: the lengths of a run are fixed", undisturbed, "--shorter=2")


def test_help_lists_every_knob_with_its_default(capsys):
    assert train("--help") == 0
    text = capsys.readouterr().out
    for field in fields(Config):
        assert f" {field.name}: {field.type.__name__} = " in text
