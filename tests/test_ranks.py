"""Several gloo ranks: they train like one, prune alike, and fail together."""

import shutil
import socket
from pathlib import Path

import pytest
import torch
from helpers import events, run, same_end

from model import KINDS
from run.checkpoint import load_checkpoint


def addresses(ranks: int) -> list[dict[str, str]]:
    """What torchrun tells each rank."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    address = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [address | {"RANK": str(rank)} for rank in range(ranks)]


def run_ranks(processes, config, out, *arguments, ranks=2, before="", after="", codes=None) -> str:
    """Runs the ranks to their end, with code before and after, and returns the errors."""
    script = f"{before}\ncode = train.main()\n{after}\nsys.exit(code)"
    given = (script, config, f"--out_dir={out}", *arguments)
    ended, error = processes(*given, environments=addresses(ranks))
    assert ended == (codes or [0] * ranks), error
    return error


def assert_close(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    a, b = (load_checkpoint(out / "checkpoint.pt") for out in (one, other))
    assert a["step"] == b["step"]
    for part in ("model", "optimizer", "scores"):
        torch.testing.assert_close(a[part], b[part], rtol=tolerance, atol=tolerance)


UPSIDE_DOWN = """
from prune import Pruner
def upside_down(self, model, score=Pruner.score):
    score(self, model)
    if os.environ["RANK"] == "1":
        self.scores = {name: -score for name, score in self.scores.items()}
Pruner.score = upside_down
"""
SEEDS = "sys.argv.append('--seed=' + os.environ['RANK'])"
DEATH = "train.Pruner.score = lambda *_: os.environ['RANK'] == '1' and os._exit(9)"
APART = [(SEEDS, [1, 1], "seed"), (DEATH, [1, 9], "--resume")]
APART += [(UPSIDE_DOWN + "train.Machine.from_rank_0 = lambda self, mask: mask", [1, 1], "weights")]


@pytest.mark.parametrize("dtype, within", [("float32", 1e-5), ("float16", 2e-3)])
def test_two_ranks_train_like_one_and_prune_what_one_chose(dtype, within, processes, toy, tmp_path):
    """The scores of the second do not count."""
    knobs, alone, both = (f"--dtype={dtype}", "--recompute=all"), tmp_path / "1", tmp_path / "2"
    assert run(toy, alone, *knobs) == 0
    run_ranks(processes, toy, both, *knobs, "--micro_batch_size=2", before=UPSIDE_DOWN)
    a, b = events(alone, "step"), events(both, "step")
    assert [e["loss"] for e in a] == pytest.approx([e["loss"] for e in b], abs=within)
    assert_close(alone, both, within)


@pytest.mark.parametrize("before, codes, word", APART)
def test_ranks_that_part_are_stopped(before, codes, word, processes, toy, tmp_path):
    assert word in run_ranks(processes, toy, tmp_path, "--shorter=3", before=before, codes=codes)


SMALL_BUCKETS = """
import run.forward, run.machine
def wrap(*arguments, wrap=run.forward.DistributedDataParallel, **others):
    run.machine.dist._DEFAULT_FIRST_BUCKET_BYTES = 500
    global ddp
    ddp = wrap(*arguments, bucket_cap_mb=0.0005, **others)
    return ddp
run.forward.DistributedDataParallel = wrap
"""
PROFILE = "import torch; profile = torch.profiler.profile(profile_memory=True); profile.start()"
PEAK = """
from itertools import accumulate
profile.stop()
events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
print(max(accumulate(changes)), file=sys.stderr)
"""


def test_three_ranks_cut_amid_prunes_end_in_the_same_bytes(processes, toy, undisturbed, tmp_path):
    """With two, the order of a sum cannot differ. One alone goes on, too. All have a teacher."""
    knobs = ["--shorter=3", "--batch_size=12", "--micro_batch_size=2", "--recompute=all"]
    knobs += ["--optimizer=muon", f"--teacher={undisturbed}"]
    several = "assert len(ddp._get_ddp_logging_data()['rebuilt_bucket_sizes'].split(',')) >= 4"
    ranks = {"ranks": 3, "before": SMALL_BUCKETS, "after": several}
    whole, cut, one = (tmp_path / name for name in ("whole", "cut", "one"))
    run_ranks(processes, toy, whole, *knobs, **ranks)
    run_ranks(processes, toy, cut, *knobs, "--stop_after=7", **ranks)
    shutil.copytree(cut, one)
    run_ranks(processes, toy, cut, *knobs, "--resume", **ranks)
    assert same_end(cut, whole)
    assert run(toy, one, *knobs, "--resume") == 0
    assert_close(one, cut, 1e-3)  # Muon multiplies in bfloat16, whatever the run does
    assert {e["kind"] for e in events(one, "prune") if e["step"] > 7} == set(KINDS)


def test_four_ranks_start_where_the_shipped_corpus_is_not_made_yet(processes, toy, tmp_path):
    """On a disk without locks. None leaves before the first has saved: torchrun would end it."""
    data, out = tmp_path / "data", tmp_path / "run"
    before = f"""
import time, data.prepare as prepare
from run import out_dir
prepare.SHIPPED_FOLDER = {str(data)!r}
def no_locks(*_, **others):
    raise OSError(37, "No locks available")
out_dir.lock_descriptor = no_locks
def slow(function, seconds):
    return lambda *given: (time.sleep(seconds), function(*given))[1]
prepare.cut_into_tasks = slow(prepare.cut_into_tasks, 0.4 * int(os.environ["RANK"]))
prepare.make_shards = slow(prepare.make_shards, 0.8)
out_dir.write_checkpoint = slow(out_dir.write_checkpoint, 1)
"""
    saved = f"assert os.path.exists({str(out / 'checkpoint.pt')!r})"
    knobs, code = (f"--data_dir={data}", "--stop_after=1"), {"before": before, "after": saved}
    said = run_ranks(processes, toy, out, *knobs, ranks=4, **code)
    assert said.count("its disk has no locks") == 1  # of the rank that writes
    assert load_checkpoint(out / "checkpoint.pt")["step"] == 1


def test_a_step_with_a_prune_takes_no_more_memory_than_any_other(processes, toy, tmp_path):
    knobs = ["--d_model=128", "--d_model_target=0", "--n_layer_target=0", "--n_kv_head_target=0"]
    knobs += ["--d_ff=1024", "--d_ff_target=256", "--batch_size=1", "--eval_tokens=16"]
    knobs += ["--max_steps=400", "--prune_start=0.01", "--prune_every=1"]
    peaks, code = [], {"ranks": 1, "before": PROFILE, "after": PEAK}
    for last in (5, 9):  # before the first prune, and after four
        stop = f"--stop_after={last}"
        said = run_ranks(processes, toy, tmp_path / stop, *knobs, stop, **code)
        peaks.append(int(said.split()[-1]))
    assert [e["step"] for e in events(tmp_path / stop, "prune")] == [6, 7, 8, 9]
    assert 20e6 < peaks[1] <= 1.1 * peaks[0]
