"""Several gloo ranks: they train like one, prune alike, and fail together."""

import shutil
import socket
import weakref
from pathlib import Path

import pytest
import torch
from helpers import ROOT, events, run, same_end

from model import KINDS, load_checkpoint
from prune import Pruner

# What `python train.py` does with an error, in a process that the fixture started
COMMAND = f"""
import runpy
try:
    runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
except Exception as error:
    sys.excepthook(type(error), error, error.__traceback__)
    sys.exit(1)
"""


def addresses(ranks: int) -> list[dict[str, str]]:
    """What torchrun tells each rank of a machine."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)]


def run_ranks(
    processes, config, out, *arguments, ranks=2, before="", after="", codes=None
) -> str:
    """Runs the ranks to their end, with code before and after. Returns their errors."""
    code = before + COMMAND + after
    given = (config, f"--out_dir={out}", *arguments)
    ended, errors = processes(code, *given, environments=addresses(ranks))
    assert ended == (codes or [0] * ranks), errors
    return errors


def at_step(step: int, rank: int, action: str) -> str:
    """Code that lets a rank do something in the middle of a step."""
    return f"""
import signal
from schedule import Schedule
learning_rate = Schedule.learning_rate
def act(self, step):
    if (step, os.environ["RANK"]) == ({step}, "{rank}"):
        {action}
    return learning_rate(self, step)
Schedule.learning_rate = act
"""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, to see that nothing was written."""
    return {path.name: path.read_bytes() for path in folder.glob("*")}


def assert_close(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """The checkpoints of two runs are equal up to rounding."""
    a = load_checkpoint(one)
    b = load_checkpoint(other)
    assert a["step"] == b["step"]
    for part in ("model", "optimizer", "scores"):
        torch.testing.assert_close(a[part], b[part], rtol=tolerance, atol=tolerance)


# The scores of rank 1 must not count, because rank 0 chooses the units for all
UPSIDE_DOWN = """
from prune import Pruner
score = Pruner.score
def upside_down(self, model):
    score(self, model)
    if os.environ["RANK"] == "1":
        self.scores = {name: -s for name, s in self.scores.items()}
Pruner.score = upside_down
"""
# torchrun ends every rank when the first one ends, so none may before rank 0 has saved
SLOW_SAVE = """
import time
fsync = os.fsync
os.fsync = lambda file: time.sleep(0.5) or fsync(file)
"""
SAVED = """
assert os.path.exists(sys.argv[2].removeprefix("--out_dir=") + "/checkpoint.pt")
"""


def test_two_ranks_train_validate_and_prune_like_one(processes, toy, tmp_path):
    alone = tmp_path / "1"
    both = tmp_path / "2"
    assert run(toy, alone, "--shorter=2", "--log_every=1") == 0
    knobs = ("--shorter=2", "--log_every=1", "--micro_batch_size=2", "--save_every=99")
    code = {"before": UPSIDE_DOWN + SLOW_SAVE, "after": SAVED}
    run_ranks(processes, toy, both, *knobs, **code)
    assert_close(alone, both)
    for kind, value in (("step", "loss"), ("step", "grad_norm"), ("eval", "val_loss")):
        expected = [e[value] for e in events(alone, kind)]
        assert [e[value] for e in events(both, kind)] == pytest.approx(expected, 1e-5)
    removed = [e["removed"] for e in events(alone, "prune")]
    assert [e["removed"] for e in events(both, "prune")] == removed


def test_three_ranks_resume_to_the_same_bytes(processes, toy, undisturbed, tmp_path):
    """With two, the order of a sum cannot differ. One rank alone can go on, too."""
    knobs = ["--shorter=3", "--batch_size=12", "--micro_batch_size=2"]
    knobs += ["--optimizer=muon", f"--teacher={undisturbed}"]
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    one = tmp_path / "one"
    stop = at_step(7, rank=2, action="signal.raise_signal(signal.SIGTERM)")
    run_ranks(processes, toy, whole, *knobs, ranks=3)
    run_ranks(processes, toy, cut, *knobs, ranks=3, before=stop, codes=[143] * 3)
    assert load_checkpoint(cut)["step"] == 7
    shutil.copytree(cut, one)
    run_ranks(processes, toy, cut, *knobs, "--resume", ranks=3)
    assert {e["kind"] for e in events(cut, "prune") if e["step"] > 7} == set(KINDS)
    assert run(toy, one, *knobs, "--resume") == 0
    assert_close(one, cut, 1e-3)  # Muon multiplies in bfloat16, whatever the run does
    assert same_end(cut, whole)


def test_a_rank_that_dies_ends_the_others(processes, toy, undisturbed, tmp_path):
    code = {"before": at_step(7, rank=1, action="os._exit(9)"), "codes": [1, 9]}
    error = run_ranks(processes, toy, tmp_path, **code)
    assert "peer" in error or "another rank is gone" in error
    assert load_checkpoint(tmp_path)["step"] == 5
    assert run(toy, tmp_path, "--resume") == 0
    assert_close(tmp_path, undisturbed)


APART = """
if os.environ["RANK"] == "1":
    sys.argv[2] += "_elsewhere"
"""


def test_what_a_rank_refuses_is_one_line_on_each_machine(processes, toy, tmp_path):
    assert run(toy, tmp_path, "--stop_after=1") == 0
    before = contents(tmp_path)
    apart = {"before": APART, "codes": [2, 2]}
    error = run_ranks(processes, toy, tmp_path, "--resume", **apart)
    assert error.startswith("error: the ranks continue from steps [1, 0]")
    assert error.count("error: ") == 1
    error = run_ranks(processes, toy, tmp_path, "--batch_size=7", codes=[2, 2])
    assert error == "error: batch_size=7: must divide by the 2 ranks\n"
    error = run_ranks(processes, toy, tmp_path, codes=[2, 1])
    assert f"error: out_dir={tmp_path}: holds a run" in error
    assert contents(tmp_path) == before


@pytest.mark.parametrize("ranks", [0, 1])
def test_a_prune_frees_the_weights_it_replaces(ranks, toy, tmp_path, monkeypatch):
    """Neither the graph of the last step nor, under torchrun, DDP's buckets."""
    for address in addresses(ranks):
        for name, value in address.items():
            monkeypatch.setenv(name, value)
    prune = Pruner.prune
    prunes = []

    def watched_prune(self, model, *others):
        before = [weakref.ref(p) for p in model.parameters()]
        record = prune(self, model, *others)
        alive = [weight() for weight in before if weight() is not None]
        assert set(alive) <= set(model.parameters())
        prunes.append(len(before) - len(alive))
        return record

    monkeypatch.setattr(Pruner, "prune", watched_prune)
    assert run(toy, tmp_path, "--shorter=3", "--micro_batch_size=4") == 0
    assert min(prunes) > 0
    assert len(prunes) == len(events(tmp_path, "prune"))
