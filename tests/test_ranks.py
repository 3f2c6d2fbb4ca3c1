"""Two gloo ranks: they train like one, prune alike, and fail together."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, events, refused, run, same_end

import train
from data.prepare import prepare
from run.checkpoint import load_checkpoint

# As train.py, with something done before and after
SCRIPT = """
import os, sys
sys.path.insert(0, os.getcwd())
import train
from run.ranks import Ranks
{before}
code = train.main()
{after}
sys.exit(code)
"""
PAIR = ("--micro_batch_size=2", "--recompute")
UPSIDE_DOWN = """
def upside_down(self, model, score=train.Pruner.score):
    score(self, model)
    if os.environ["RANK"] == "1":
        self.scores = {name: -score for name, score in self.scores.items()}
train.Pruner.score = upside_down
"""


@pytest.fixture(scope="module")
def run_ranks(together):
    """Runs the ranks to their end, and returns the errors."""

    def run_ranks(config, out, *arguments, ranks=2, before="", after="", codes=None) -> str:
        with socket.create_server(("localhost", 0)) as free:
            port = str(free.getsockname()[1])
        address = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environments = [address | {"RANK": str(rank)} for rank in range(ranks)]
        script = SCRIPT.format(before=before, after=after)
        arguments = (config, f"--out_dir={out}", *arguments)
        ended, _, error = together(script, *arguments, environments=environments)
        assert ended == (codes or [0] * ranks), error
        return error

    return run_ranks


def torchrun(config: Path, out: Path, *arguments: str, ranks: int, before="") -> str:
    script = out.with_name("script.py")
    script.write_text(SCRIPT.format(before=before, after=""))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *launcher, "--max-restarts=2", str(script), str(config)]
    result = subprocess.run(
        [*command, f"--out_dir={out}", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def assert_close(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """The same weights, moments and scores, to within rounding."""
    a, b = (load_checkpoint(out / "checkpoint.pt") for out in (one, other))
    assert a["step"] == b["step"]
    for part in ("model", "optimizer", "scores"):
        torch.testing.assert_close(a[part], b[part], rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def pair(run_ranks, toy, tmp_path_factory) -> Path:
    """No thread of gloo is left at its end: it might abort the process."""
    out = tmp_path_factory.mktemp("pair") / "run"
    threads = "[open(f'/proc/self/task/{t}/comm').read() for t in os.listdir('/proc/self/task')]"
    none = f"assert not os.path.exists('/proc/self/task') or 'gloo' not in str({threads})"
    run_ranks(toy, out, *PAIR, after=none)
    return out


def test_two_ranks_train_like_one(undisturbed, pair):
    a, b = events(undisturbed, "step"), events(pair, "step")
    assert [e["loss"] for e in a] == pytest.approx([e["loss"] for e in b], abs=1e-5)
    assert len(events(pair, "done")) == 1
    assert_close(undisturbed, pair)


SMALL_BUCKETS = """
import run.ranks
def wrap(*arguments, wrap=run.ranks.DistributedDataParallel, **others):
    run.ranks.dist._DEFAULT_FIRST_BUCKET_BYTES = 500
    global ddp
    ddp = wrap(*arguments, bucket_cap_mb=0.0005, **others)
    return ddp
run.ranks.DistributedDataParallel = wrap
"""


def test_three_ranks_stopped_between_prunes_end_in_the_same_bytes(run_ranks, toy, tmp_path):
    """With two, the order of a sum cannot differ. The activations, too, are those of all ranks."""
    knobs = ["--batch_size=12", "--micro_batch_size=2", "--recompute"]
    knobs += ["--optimizer=muon", "--criterion=activation"]
    sizes = "ddp._get_ddp_logging_data()['rebuilt_bucket_sizes'].split(',')"
    several = f"assert len({sizes}) >= 4"
    ranks = {"ranks": 3, "before": SMALL_BUCKETS, "after": several}
    run_ranks(toy, tmp_path / "whole", *knobs, **ranks)
    for more in ("--stop_after=17", "--resume"):
        run_ranks(toy, tmp_path / "cut", *knobs, more, **ranks)
    assert same_end(tmp_path / "cut", tmp_path / "whole")
    assert run(toy, tmp_path / "one", *knobs) == 0
    assert_close(tmp_path / "one", tmp_path / "cut")


def test_two_ranks_learn_from_a_teacher_like_one(run_ranks, toy, undisturbed, tmp_path):
    knob = f"--teacher={undisturbed}"
    for more in ("--stop_after=17", "--resume"):
        run_ranks(toy, tmp_path / "two", knob, more)
    assert run(toy, tmp_path / "one", knob) == 0
    assert_close(tmp_path / "one", tmp_path / "two")


def test_one_rank_then_two_then_one_end_where_one_does(run_ranks, toy, undisturbed, tmp_path):
    out = tmp_path / "run"
    assert run(toy, out, "--stop_after=8") == 0
    run_ranks(toy, out, "--resume", "--stop_after=21")
    assert load_checkpoint(out / "checkpoint.pt")["step"] == 21
    assert run(toy, out, "--resume") == 0
    assert [e["step"] for e in events(out, "step")] == list(range(1, 31))
    assert_close(undisturbed, out)


def test_all_ranks_prune_what_the_first_chose_and_stop_if_they_differ(
    run_ranks, toy, pair, tmp_path
):
    run_ranks(toy, tmp_path / "run", *PAIR, before=UPSIDE_DOWN)
    assert same_end(tmp_path / "run", pair)
    each_its_own = UPSIDE_DOWN + "Ranks.agree = lambda self, mask: mask"
    error = run_ranks(toy, tmp_path / "other", before=each_its_own, codes=[1, 1])
    assert "error: the ranks hold different weights" in error
    assert events(tmp_path / "other", "step")[-1]["step"] == 14


def test_ranks_that_would_start_at_different_steps_are_stopped(run_ranks, toy, tmp_path):
    """As on two machines whose out_dir is not the same disk."""
    assert run(toy, tmp_path / "run0", "--stop_after=8") == 0
    own_disk = "sys.argv[2] += os.environ['RANK']"
    error = run_ranks(toy, tmp_path / "run", "--resume", before=own_disk, codes=[1, 1])
    assert "error: step=8 on this rank, another elsewhere" in error


def test_ranks_on_other_data_are_stopped(run_ranks, toy, tmp_path):
    """As on two machines whose data_dir is not the same disk."""
    prepare([toy.with_name("text.jsonl")], "shipped", tmp_path / "1", val_fraction=0.2)
    (tmp_path / "0").symlink_to(toy.with_name("data"))
    own_disk = f"sys.argv.append('--data_dir={tmp_path}/' + os.environ['RANK'])"
    error = run_ranks(toy, tmp_path / "run", before=own_disk, codes=[1, 1])
    assert re.search("error: data='.*' on this rank, another elsewhere; give all", error)


def test_a_rank_that_never_answers_is_noticed_at_the_start(run_ranks, toy, tmp_path):
    """As where GPUs see each other, and cannot talk."""
    silent = f"""
import datetime, run.ranks, time
run.ranks.FIRST_WAIT = datetime.timedelta(seconds=1)
ended = {str(tmp_path / "ended")!r}
def end():  # not by torch, which goes on for minutes
    os.mkdir(ended)
    os._exit(1)
def wait_for_its_end(*_, **__):
    while not os.path.exists(ended):
        time.sleep(0.05)
    os._exit(0)
if os.environ["RANK"] == "0":
    run.ranks.dist.destroy_process_group = end
else:
    run.ranks.dist.all_reduce = wait_for_its_end
"""
    error = run_ranks(toy, tmp_path / "run", before=silent, codes=[1, 0])
    assert "error: found the other ranks, but a first sum with them failed" in error
    assert "NCCL_P2P_DISABLE=1" in error and not (tmp_path / "run").exists()


def test_a_killed_rank_stops_the_other_and_torchrun_starts_both_again(toy, pair, tmp_path):
    dies_once = """
def save(self, step, *arguments, save=train.Report.save_checkpoint, **others):
    if step == 15 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), 9)
    save(self, step, *arguments, **others)
train.Report.save_checkpoint = save
"""
    error = torchrun(toy, tmp_path / "run", *PAIR, "--resume", ranks=2, before=dies_once)
    assert "error: another rank no longer answers; --resume goes on" in error
    assert same_end(tmp_path / "run", pair)
    assert [e["resumed"] for e in events(tmp_path / "run", "start")] == [False, True]


def test_no_rank_leaves_a_stopped_run_before_the_first_has_saved(run_ranks, toy, tmp_path):
    """After a signal, torchrun would end the first in the middle of its save."""
    slow = """
import time
from run import report
def save(*arguments, save=report.write_checkpoint):
    time.sleep(1)
    save(*arguments)
report.write_checkpoint = save
"""
    saved = "assert os.path.exists(os.path.join(train.sys.argv[2][10:], 'checkpoint.pt'))"
    run_ranks(toy, tmp_path / "run", "--stop_after=3", before=slow, after=saved)


def test_four_ranks_start_where_the_shipped_corpus_is_not_made_yet(run_ranks, toy, tmp_path):
    """One makes it. The others wait for it, and none of them keeps the others waiting."""
    data = tmp_path / "data"
    elsewhere = f"import data.prepare as prepare; prepare.SHIPPED_FOLDER = {str(data)!r}"
    knobs = (f"--data_dir={data}", "--stop_after=1")
    run_ranks(toy, tmp_path / "run", *knobs, ranks=4, before=elsewhere)
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 1


def test_a_number_of_ranks_alone_is_one_line(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = f"--out_dir={tmp_path}"
    refused(capsys, train.main, toy, out, words="RANK expected, but not set; torchrun sets all")
