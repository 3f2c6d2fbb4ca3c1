"""Two gloo ranks under torchrun: they train like one, prune alike, and fail together."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from test_faults import TORCHRUN, start
from test_run import ROOT, events, run, same_end, toy, undisturbed  # noqa: F401 (fixtures)

from run.checkpoint import load_checkpoint

# As train.py, but rank 1 scores units upside down; with LOCAL=1 it prunes what it chose itself.
DISSENT = """
import os, sys
sys.path.insert(0, os.getcwd())
import train
from run import machine
if os.environ["RANK"] == "1":
    agreed = train.update_scores
    def reversed_scores(scores, *arguments):
        agreed(scores, *arguments)
        for name in scores:
            scores[name] = -scores[name]
    train.update_scores = reversed_scores
if os.environ.get("LOCAL"):
    machine.Ranks.from_first = lambda self, mask: mask
sys.exit(train.main())
"""

# As train.py; tells how many first moments a rank holds, how many prunes it saw, and by how many
# bytes it grew from the fifth to the last. Gradients that are there must be views of one bucket,
# and no thread of gloo be left when Python ends: one that lets go of a tensor would abort it.
WATCHED = """
import os, pathlib, sys
sys.path.insert(0, os.getcwd())
import train
make, prune, forward = train.make_optimizer, train.prune, train.GPT.forward
optimizers, resident = [], []
def make_optimizer(*arguments):
    optimizers.append(make(*arguments))
    return optimizers[-1]
def watched_prune(*arguments):
    resident.append(int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    return prune(*arguments)
def watched_forward(self, *arguments):
    gradients = [p.grad for p in self.parameters() if p.grad is not None]
    assert len({g.untyped_storage().data_ptr() for g in gradients}) <= 1
    return forward(self, *arguments)
train.make_optimizer, train.prune = make_optimizer, watched_prune
train.GPT.forward = watched_forward
code = train.main()
threads = [(task / "comm").read_text() for task in pathlib.Path("/proc/self/task").iterdir()]
assert not [name for name in threads if "gloo" in name]
moments = sum(state["exp_avg"].numel() for state in optimizers[-1].state.values())
told = f"watched {moments} {len(resident)} {resident[-1] - resident[4]}\\n"
os.write(2, told.encode())  # whole, whatever the other rank writes
sys.exit(code)
"""


def two_ranks(config: Path, out: Path, *arguments: str, script="train.py", **environment):
    command = [*TORCHRUN, str(script), str(config), f"--out_dir={out}", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def assert_close(one: Path, other: Path, tolerance: float) -> None:
    """The same weights, moments and scores, to within rounding."""
    a, b = (load_checkpoint(out / "checkpoint.pt") for out in (one, other))
    assert a["step"] == b["step"] and a["optimizer"].keys() == b["optimizer"].keys()
    a["optimizer"], b["optimizer"] = (
        {
            f"{name}.{key}": value
            for name, state in s["optimizer"].items()
            for key, value in state.items()
        }
        for s in (a, b)
    )
    for part in ("model", "optimizer", "scores"):
        assert a[part].keys() == b[part].keys()
        for name, value in a[part].items():
            torch.testing.assert_close(b[part][name], value, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def pair(toy, tmp_path_factory) -> Path:  # noqa: F811
    out = tmp_path_factory.mktemp("pair") / "run"
    result = two_ranks(toy, out, "--micro_batch_size=2")
    assert result.returncode == 0, result.stderr
    return out


def test_two_ranks_train_like_one(undisturbed, pair):  # noqa: F811
    a, b = events(undisturbed, "step"), events(pair, "step")
    assert [e["loss"] for e in a] == pytest.approx([e["loss"] for e in b], abs=1e-5)
    assert [(e["d_ff"], e["n_kv_head"]) for e in a] == [(e["d_ff"], e["n_kv_head"]) for e in b]
    assert len(events(pair, "done")) == 1
    assert_close(undisturbed, pair, 1e-5)


def test_shared_out_moments_and_recomputed_activations_change_no_bit(toy, pair, tmp_path):  # noqa: F811
    result = two_ranks(
        toy, tmp_path / "run", "--shard_optimizer", "--recompute", "--micro_batch_size=2"
    )
    assert result.returncode == 0, result.stderr
    assert_close(pair, tmp_path / "run", 0.0)


def test_20_prunes_leave_memory_flat_gradients_in_buckets_moments_shared_no_thread(toy, tmp_path):  # noqa: F811
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)
    knobs = ["--max_steps=60", "--d_ff=88", "--n_kv_head_target=0", "--prune_every=1"]
    knobs += ["--prune_schedule=linear", "--micro_batch_size=1", "--shard_optimizer"]
    result = two_ranks(toy, tmp_path / "run", *knobs, script=script)
    assert result.returncode == 0, result.stderr
    watched = [line.split()[1:] for line in result.stderr.splitlines() if "watched" in line]
    moments, prunes, growth = zip(*(map(int, numbers) for numbers in watched))
    assert sum(moments) == events(tmp_path / "run", "done")[0]["params"] and min(moments) > 0
    assert min(prunes) == 20 and max(growth) < 10_000_000


def test_one_rank_then_two_then_one_end_where_one_does(toy, undisturbed, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    assert run(toy, out, "--stop_after=8") == 0
    result = two_ranks(toy, out, "--resume", "--stop_after=21", "--shard_optimizer")
    assert result.returncode == 0, result.stderr
    assert load_checkpoint(out / "checkpoint.pt")["step"] == 21
    assert run(toy, out, "--resume") == 0
    assert [e["step"] for e in events(out, "step")] == list(range(1, 31))
    assert_close(undisturbed, out, 1e-5)


def test_activations_are_averaged_over_ranks_and_counted_once_when_recomputed(toy, tmp_path):  # noqa: F811
    knobs = ["--criterion=activation", "--stop_after=20", "--micro_batch_size=2"]
    assert run(toy, tmp_path / "one", *knobs) == 0
    result = two_ranks(toy, tmp_path / "two", *knobs, "--recompute")
    assert result.returncode == 0, result.stderr
    assert_close(tmp_path / "one", tmp_path / "two", 1e-5)


def test_all_ranks_prune_what_the_first_one_chose(toy, pair, tmp_path):  # noqa: F811
    script = tmp_path / "dissent.py"
    script.write_text(DISSENT)
    result = two_ranks(toy, tmp_path / "run", "--micro_batch_size=2", script=script)
    assert result.returncode == 0, result.stderr
    assert same_end(tmp_path / "run", pair)


def test_ranks_that_differ_after_a_prune_stop_the_run(toy, tmp_path):  # noqa: F811
    script = tmp_path / "dissent.py"
    script.write_text(DISSENT)
    result = two_ranks(toy, tmp_path / "run", script=script, LOCAL="1")
    assert result.returncode == 1
    assert "error: step 15: the ranks hold different weights" in result.stderr
    assert events(tmp_path / "run", "step")[-1]["step"] == 14


def test_ranks_that_would_start_at_different_steps_are_stopped(toy, tmp_path):  # noqa: F811
    """As on two machines whose out_dir is not the same disk."""
    script = tmp_path / "own_disk.py"
    script.write_text(
        "import os, sys; sys.path.insert(0, os.getcwd()); import train\n"
        "sys.argv[2] += os.environ['RANK']\n"
        "sys.exit(train.main())\n"
    )
    assert run(toy, tmp_path / "run0", "--stop_after=8") == 0
    result = two_ranks(toy, tmp_path / "run", "--resume", script=script)
    assert result.returncode == 1
    assert "error: this rank starts after step 8, another elsewhere" in result.stderr


# As train.py, but rank 1 is killed: at its third save and, on one node, already in its first start,
# before it has spoken, when rank 0 waits for it. (Launchers of several nodes each count restarts.)
MORTAL = """
import os, pathlib, signal, sys, time, types
sys.path.insert(0, os.getcwd())
import train
from run import machine
waits, killed = (pathlib.Path(__file__).with_name(name) for name in ("waits", "killed"))

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def sleep(seconds):  # rank 0 does so between two looks for rank 1
    waits.touch()
    time.sleep(seconds)

first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["LOCAL_WORLD_SIZE"] == "2"
if os.environ["RANK"] == "1" and first:
    while not waits.exists():
        time.sleep(0.01)
    die()

def gather_and_die(self, *arguments):
    global saves
    moments = gather(self, *arguments)
    saves += 1
    if saves == 3 and self.rank == 1 and not killed.exists():
        killed.touch()
        die()
    return moments

saves, gather, machine.Ranks.gather_moments = 0, machine.Ranks.gather_moments, gather_and_die
machine.time = types.SimpleNamespace(sleep=sleep, monotonic=time.monotonic)
sys.exit(train.main())
"""


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_killed_rank_stops_the_other_and_torchrun_starts_both_again(nodes, toy, pair, tmp_path):  # noqa: F811
    out, launchers = tmp_path / "run", [[*TORCHRUN, "--max-restarts=2"]]
    if nodes == 2:  # each with a launcher of its own, which counts restarts for itself
        with socket.socket() as free:
            free.bind(("localhost", 0))
            where = f"--rdzv_endpoint=localhost:{free.getsockname()[1]}"
        node = [*TORCHRUN[:3], "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3"]
        launchers = [[*node, "--rdzv_backend=c10d", where]] * 2
    script = tmp_path / "mortal.py"
    script.write_text(MORTAL)
    started = [
        start([*launcher, script], toy, out, "--micro_batch_size=2", stderr=subprocess.PIPE)
        for launcher in launchers
    ]
    errors = [process.communicate()[1].decode() for process in started]
    assert [process.returncode for process in started] == [0] * nodes, errors
    assert (tmp_path / "killed").exists()
    assert any("error: another rank no longer answers; --resume goes on" in e for e in errors)
    assert same_end(out, pair)
    resumed = [e["resumed"] for e in events(out, "start")]
    assert resumed[0] is False and set(resumed[1:]) == {True}
