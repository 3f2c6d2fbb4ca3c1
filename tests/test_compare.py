"""The comparison: which arms compare, how their runs come to be, what the table says of them."""

import fcntl
import json
import math
import shutil
import signal
import time
from pathlib import Path

import pytest
from helpers import ROOT, refused, run, same_end

from run import UserError
from run.checkpoint import load_checkpoint
from run.folder import read_log
from tools import compare, results
from tools.arms import load_arms
from tools.results import RUN_COLUMNS

SCRATCH = dict(d_ff=8, n_head=1, n_kv_head=1, head_dim=4, d_model=8, n_layer=2)
SCRATCH |= dict(d_ff_target=0, n_kv_head_target=0, d_model_target=0, n_layer_target=0)
SIX = ("idea", "scratch", "scratch_flops", "naive", "oneshot", "enlarged")
LAB = [f"configs/lab/{name}.py" for name in SIX]
DEFAULT = [f"configs/{name}.py" for name in (*SIX, "idea_paper", "idea_attention")]
SHIPPED = {
    "lab": [*LAB, "studies/lab/ablations.py", "studies/lab/place.py"],
    "default": [*DEFAULT, "studies/default/place.py"],
    "gpu": ["studies/lab/gpu.py"],
    "axes": ["studies/units/axes.py"],
    "axes_lab": ["studies/units/axes_lab.py"],
    "limited": ["studies/limited/arms.py"],
    "tokens, lab": ["studies/tokens/lab_18.py"],
    "tokens, default": ["studies/tokens/default_65.py"],
}


@pytest.fixture(scope="module")
def idea(toy) -> str:
    return str(shutil.copy(toy, toy.with_name("idea.py")))


def table(idea: str, **arms: dict) -> str:
    path = Path(idea).with_name("arms.py")
    path.write_text(f"base = {idea!r}\narms = {arms}\n")
    return str(path)


@pytest.mark.parametrize("shorter", [1, 8])
@pytest.mark.parametrize("paths", SHIPPED.values(), ids=SHIPPED)
def test_shipped_arms_compare_and_scratch_flops_is_even_to_a_step(paths, shorter):
    knobs = ["--data_dir=data/sotu", f"--shorter={shorter}"]
    arms = {arm.name: arm.plan for arm in load_arms(paths, knobs, "idea")}
    theirs, ours = arms["idea"], arms["scratch_flops"]
    assert abs(ours.flops() - theirs.flops()) < ours.flops() / ours.schedule.max_steps
    lengths = {name: plan.schedule.max_steps for name, plan in arms.items()}
    assert {name for name in arms if lengths[name] != lengths["idea"]} == {"scratch_flops"}
    assert {name for name in arms if arms[name].final != theirs.final} == {"enlarged"} & arms.keys()


def test_an_arm_of_a_table_is_its_base_with_its_changes_and_knobs(idea):
    path = table(idea, oneshot={"prune_schedule": "oneshot"}, other={"seed": 2})
    base, one = load_arms([idea, f"{path}:oneshot"], ["--d_model=32"], "idea")
    changed = {key for key, value in vars(one.config).items() if value != vars(base.config)[key]}
    assert changed == {"prune_schedule"} and one.config.d_model == 32
    for argument, words in ((f"{path}:a", "no arm 'a'; it has oneshot"), (idea, "a second arm")):
        with pytest.raises(UserError, match=words):
            load_arms([idea, argument], [], "idea")
    with pytest.raises(UserError, match="a table of arms needs base"):
        load_arms([idea, table(idea, other=3)], [], "idea")


def test_arms_that_do_not_compare_are_refused_with_a_max_steps(idea):
    def refused(words: str, **changes) -> str:
        with pytest.raises(UserError, match=words) as error:
            load_arms([idea, table(idea, other=changes)], [], "idea")
        return str(error.value)

    refused("arm other: ends with .* parameters, .*: not comparable", d_ff_target=16)
    # 16 x 4 weights in each of q, k, v, o, or 16 x 6 in q and o and 16 x 2 in k and v: as many
    alike = SCRATCH | {"n_head": 3, "head_dim": 2}
    refused(r"ends with ([\d,]+) parameters, idea with \1, or in another shape", **alike)
    refused("arm other: .* nearest is 'd_ff'", d_fff=3)
    words = refused("arm other: neither the tokens of idea nor its FLOPs", **SCRATCH, max_steps=500)
    steps = int(words.partition("max_steps=")[2].split()[0])
    for other in (steps - 3, steps + 3):
        refused(f"not comparable; max_steps={steps} ", **SCRATCH, max_steps=other)
    for same in (steps, 30):  # the FLOPs, the tokens
        load_arms([idea, table(idea, other=SCRATCH | {"max_steps": same})], [], "idea")


def call(folder: Path, *arguments: str) -> list[str]:
    return [*arguments, f"--out={folder / 'results'}", f"--runs={folder / 'runs'}", "--seeds=1"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_what_runs_and_starts_nothing_else(number, idea, tmp_path, monkeypatch):
    first, other = tmp_path / "runs" / "idea" / "1", table(idea, other={"seed": 2})

    def sleep(seconds: float, pause=time.sleep) -> None:
        pause(seconds)
        if (first / "log.jsonl").exists():
            signal.raise_signal(number)

    monkeypatch.setattr(compare.time, "sleep", sleep)
    assert compare.main(call(tmp_path, idea, other, "--max_steps=9000")) == 130
    assert 0 < load_checkpoint(first / "checkpoint.pt")["step"] < 9000
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["idea"]


def test_interrupted_it_goes_on_and_what_is_done_is_not_run_again(idea, tmp_path, capsys):
    out, first = tmp_path / "results", tmp_path / "runs" / "idea" / "1"
    command = call(tmp_path, idea, "--dtype=auto")
    assert compare.main([*command, "--stop_after=12"]) == 0 and not out.exists()
    assert compare.main(command) == 0, capsys.readouterr().err
    assert run(Path(idea), tmp_path / "straight", "--dtype=auto") == 0
    assert same_end(first, tmp_path / "straight")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.*")}
    assert compare.main(command) == 0
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.*")}

    # The table comes out of runs.csv, which holds every seed that is done
    made = {path: path.read_bytes() for path in out.iterdir()}
    for path in made.keys() - {out / "runs.csv"}:
        path.unlink()
    assert results.main([str(out)]) == 0
    assert made == {path: path.read_bytes() for path in out.iterdir()}
    assert results.main([str(out), "nope"]) == 2
    assert "no arm 'nope'; it has idea" in capsys.readouterr().err
    second = shutil.copytree(first, first.with_name("2"))
    assert compare.main(command) == 0
    rows = results.read_csv(out / "runs.csv")
    assert [(row["arm"], row["seed"]) for row in rows] == [("idea", 1), ("idea", 2)]
    done = read_log(tmp_path / "straight")[-1]
    assert all(rows[0][key] == done[key] for key in ("val_loss", "params", "tokens", "flops"))
    log = (second / "log.jsonl").read_text()
    (second / "log.jsonl").write_text(log.replace('"data": "', '"data": "of another text, '))
    refused(capsys, compare.main, *command, words="runs of different data do not compare")
    (second / "log.jsonl").write_text(log)
    then = json.loads((first / "config.json").read_text())
    (second / "config.json").write_text(json.dumps(then | {"eval_tokens": 99}))
    refused(capsys, compare.main, *command, words="eval_tokens=99 there|different eval_tokens")
    (second / "config.json").write_text(json.dumps(then | {"dtype": "float16"}))
    refused(capsys, compare.main, *command, words="runs of different precision do not compare")
    (second / "config.json").write_text(json.dumps(then | {"weight_decay": 0.2}))
    refused(capsys, compare.main, *command, words="idea/2: made by another .*=0.2 there, 0.1 in ")


def test_an_arm_that_fails_stops_no_other_and_its_own_error_is_shown(
    idea, tmp_path, capsys, monkeypatch
):
    """A process that an older call has left runs in its folder and writes to its output."""
    held = tmp_path / "runs" / "held" / "1"
    held.mkdir(parents=True)
    with open(held / "lock", "w") as lock, open(held / "output.txt", "w") as output:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def sleep(seconds: float, pause=time.sleep) -> None:
            pause(seconds)
            print("step 5", file=output, flush=True)

        monkeypatch.setattr(compare.time, "sleep", sleep)
        arms = table(idea, held={"learning_rate": 2e-3})
        assert compare.main(call(tmp_path, arms, idea, "--jobs=2", "--shorter=2")) == 1
    assert "error: out_dir=" in capsys.readouterr().err
    rows = results.read_csv(tmp_path / "results" / "runs.csv")
    assert [(row["arm"], row["tokens"]) for row in rows] == [("idea", 15 * 128)]


def test_no_job_at_all_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        compare.main(["configs/idea.py", "--out=x", "--jobs=0"])
    assert "error: argument --jobs: invalid positive value: '0'" in capsys.readouterr().err


def rows_of(losses: dict[str, dict[int, float]]) -> list[dict]:
    """Of runs.csv, with 7 in all other columns."""
    pairs = [(arm, seed, loss) for arm, seeds in losses.items() for seed, loss in seeds.items()]
    names = dict.fromkeys(RUN_COLUMNS, 7)
    return [names | {"arm": arm, "seed": seed, "val_loss": loss} for arm, seed, loss in pairs]


def test_results_of_a_run_that_the_call_has_not_got_are_never_lost(tmp_path):
    all_rows = rows_of({"idea": {1: 3.5, 2: 3.25}, "oneshot": {1: 4.0}})
    results.write(tmp_path, all_rows)
    compare.check_complete(tmp_path, [*all_rows, *rows_of({"naive": {1: 3.75}})])
    other = rows_of({"idea": {1: 3.50001, 2: 3.25}, "oneshot": {1: 4.0}})
    for rows, lost in ((all_rows[:2], "oneshot, seed 1"), (other, "idea, seed 1")):
        with pytest.raises(UserError, match=f"holds a run of {lost}, .*give another --out"):
            compare.check_complete(tmp_path, rows)


def test_a_row_that_is_no_row_of_numbers_is_named(tmp_path, capsys):
    for row in ("idea,1,much", "idea,1", "idea,1,2,3"):
        (tmp_path / "runs.csv").write_text(f"arm,seed,val_loss\n{row}\n")
        refused(capsys, results.main, tmp_path, words="runs.csv: line 2: ")


def test_committed_tables_come_out_of_their_runs_byte_for_byte():
    tables = {path.with_name("runs.csv"): path for path in (ROOT / "studies").rglob("table.md")}
    paths = [path for path in tables if path.exists()]
    for path in paths:
        committed = tables[path].read_text()
        reference = "scratch_flops" if "challenge" in path.parts else "idea"
        assert results.table(results.read_csv(path), reference) == committed, path
    assert len(paths) > 10


def test_p_values_match_closed_forms_and_the_table_of_student():
    for differences, p in (
        ([1.0, 3.0], 0.29516723530086653),  # t = 2, one degree of freedom: 1 - 2 atan(2) / pi
        ([-1.0, -2.0, -3.0], 0.07417990022744858),  # 2 sqrt(3), two: 1 - t / sqrt(2 + t^2)
        # Student's table: two-sided 5% at 4 degrees of freedom is 2.776445
        ([x + 2.776445105 * math.sqrt(0.5) for x in (-2.0, -1.0, 0.0, 1.0, 2.0)], 0.05),
        ([0.5, 0.5, 0.5], 0.0),
    ):
        assert results.t_test(differences) == pytest.approx(p, abs=1e-8)


def test_the_table_holds_mean_spread_and_paired_difference():
    losses = {"naive": {1: 3.1, 2: 3.4}, "idea": {1: 3.0, 2: 3.2}, "late": {2: 3.1}}
    lines = results.table(rows_of(losses), "idea").splitlines()
    assert lines[2].startswith("| late | 1 | 3.1000 | 7.0000 | -0.1000 |")
    assert lines[3].startswith("| idea | 2 | 3.1000 ± 0.1414 | 7.0000 ± 0.0000 |  |")
    assert lines[4].startswith("| naive | 2 | 3.2500 ± 0.2121 | 7.0000 ± 0.0000 | +0.1500 (0.2) |")
    assert lines[-1] == "Arms have different seeds: compare the differences, not the losses."
