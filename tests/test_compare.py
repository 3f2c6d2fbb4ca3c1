"""The comparison: which arms compare, how their runs come to be, what the table says of them."""

import math
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from helpers import ROOT, refused, run, same_end

from run import UserError
from run.checkpoint import load_checkpoint
from run.folder import read_log
from tools import compare, results
from tools.arms import load_arms
from tools.results import COLUMNS

SCRATCH = dict(d_ff=8, n_head=1, n_kv_head=1, head_dim=4, d_model=8, n_layer=2)
SCRATCH |= dict(d_ff_target=0, n_kv_head_target=0, d_model_target=0, n_layer_target=0)
SIX = ("idea", "scratch", "scratch_flops", "naive", "oneshot", "enlarged")
LAB = [f"configs/lab/{name}.py" for name in SIX]
DEFAULT = [f"configs/{name}.py" for name in (*SIX, "idea_paper", "idea_attention")]
SHIPPED = [
    [*LAB, "studies/lab/ablations.py"],
    [*DEFAULT, "studies/default/place.py"],
    *([f"studies/{name}.py"] for name in ("lab/gpu", "units/axes", "units/axes_lab")),
    *([f"studies/{name}.py"] for name in ("limited/arms", "tokens/lab_18", "tokens/default_142")),
]


@pytest.fixture(scope="module")
def idea(toy) -> str:
    return str(shutil.copy(toy, toy.with_name("idea.py")))


def table(idea: str, **arms: dict) -> str:
    path = Path(idea).with_name("arms.py")
    path.write_text(f"base = {idea!r}\narms = {arms}\n")
    return str(path)


@pytest.mark.parametrize("shorter", [1, 8])
@pytest.mark.parametrize("paths", SHIPPED, ids=lambda paths: paths[-1])
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
    for arms, words in (
        (f"{path}:a", "no such name, .*: 'a'"),
        (idea, "a second arm"),
        (table(idea, other=3), "a table of arms needs base"),
    ):
        with pytest.raises(UserError, match=words):
            load_arms([idea, arms], [], "idea")


def test_arms_that_do_not_compare_are_refused_with_a_max_steps(idea):
    def refused(words: str, **changes) -> str:
        with pytest.raises(UserError, match=words) as error:
            load_arms([idea, table(idea, other=changes)], [], "idea")
        return str(error.value)

    # 16 x 4 weights in each of q, k, v, o, or 16 x 6 in q and o and 16 x 2 in k and v: as many
    alike = SCRATCH | {"n_head": 3, "head_dim": 2}
    refused(r"not comparable with idea: .* another shape \(([\d,]+) and \1 param", **alike)
    refused("arm other: .* nearest is 'd_ff'", d_fff=3)
    words = refused("arm other: .*neither its tokens nor its FLOPs", **SCRATCH, max_steps=500)
    steps = int(words.partition("max_steps=")[2].split()[0])
    for other in (steps - 3, steps + 3):
        refused(f"not comparable .*; max_steps={steps} ", **SCRATCH, max_steps=other)
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
    made = {path: path.read_bytes() for path in out.iterdir()}
    (out / "table.md").unlink()  # it comes out of runs.csv
    assert compare.main(command) == 0
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.*")}
    assert made == {path: path.read_bytes() for path in out.iterdir()}
    refused(capsys, results.main, out, "nope", words="no arm 'nope'; it has idea")
    done, row = read_log(first)[-1], results.read_csv(out / "runs.csv")["idea"][1]
    assert all(row[key] == done[key] for key in ("val_loss", "params", "tokens", "flops"))

    # All seeds that are there count, and must compare
    second = shutil.copytree(first, first.with_name("2"))
    assert compare.main([*command, "--seeds=2-2"]) == 0
    assert results.read_csv(out / "runs.csv") == {"idea": {1: row, 2: row | {"seed": 2}}}
    for name, old, new, words in (
        ("log.jsonl", '"data": "', '"data": "other', "idea/2: does not compare: .*other"),
        ("log.jsonl", "loss_after", "loss_later", "idea/2: an event of its log is damaged"),
        ("config.json", '"float32"', '"float16"', "idea/2: does not compare: .*float16"),
        ("config.json", '"weight_decay": 0.1', '"weight_decay": 0.2', "idea/2: made .*=0.2"),
    ):
        text = (second / name).read_text()
        assert old in text
        (second / name).write_text(text.replace(old, new))
        refused(capsys, compare.main, *command, words=words)
        (second / name).write_text(text)


def test_an_arm_that_fails_stops_no_other_and_its_own_error_is_shown(idea, tmp_path, capsys):
    other = tmp_path / "runs" / "other" / "1"
    other.mkdir(parents=True)
    (other / "checkpoint.pt").write_text("of another program")
    arms = table(idea, other={"learning_rate": 2e-3})
    assert compare.main(call(tmp_path, arms, idea, "--jobs=2", "--shorter=2")) == 1
    words = "exit code 2: error: .* holds checkpoint.pt, but no config.json"
    assert re.search(words, capsys.readouterr().err)
    arms = results.read_csv(tmp_path / "results" / "runs.csv")
    assert arms.keys() == {"idea"} and arms["idea"][1]["tokens"] == 15 * 128


def test_seeds_are_a_number_or_a_range_and_what_makes_no_sense_is_one_line(capsys):
    assert [*compare.seed_range("3")] == [1, 2, 3] and [*compare.seed_range("8-9")] == [8, 9]
    for wrong in ("--jobs=0", "--seeds=0", "--seeds=3-1", "--seeds=-2", "--out="):
        with pytest.raises(SystemExit, match="2"):
            compare.main(["configs/idea.py", "--out=x", wrong])
        assert f"error: argument {wrong.partition('=')[0]}: " in capsys.readouterr().err


def arms_of(losses: dict[str, dict[int, float]], **others) -> results.Arms:
    """As of a runs.csv, with 7 in all columns but the others."""
    row = dict.fromkeys(COLUMNS, 7) | others
    return {
        arm: {
            seed: row | {"arm": arm, "seed": seed, "val_loss": loss} for seed, loss in runs.items()
        }
        for arm, runs in losses.items()
    }


def test_results_of_a_run_that_the_call_has_not_got_are_never_lost(tmp_path):
    few = {"idea": {1: 3.5, 2: 3.25}, "oneshot": {1: 4.0}}
    more = few | {"naive": {1: 3.75}}
    for losses in (few, more):
        results.write(tmp_path, arms_of(losses))
    for losses, lost in (({"idea": few["idea"]}, "oneshot"), (more | {"idea": {1: 3.1}}, "idea")):
        with pytest.raises(UserError, match=f"holds a run of {lost}, seed 1, .* another --out"):
            results.write(tmp_path, arms_of(losses))
    assert results.read_csv(tmp_path / "runs.csv") == arms_of(more)


def test_what_is_no_result_is_refused_before_a_run_and_not_replaced(tmp_path, monkeypatch, capsys):
    """The ~ of --out=~/mine is the home folder, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    monkeypatch.setattr(compare, "start", None)
    head, row = ",".join(COLUMNS) + "\n", "idea,1,3,1,7,7,7,7,0\n"
    refuse = partial(refused, capsys, compare.main, "configs/idea.py", "--out=~/mine")
    csv, made = (tmp_path / "mine" / name for name in ("runs.csv", "table.md"))
    csv.parent.mkdir()
    made.write_text("# my own")
    refuse(words="table.md: has no runs.csv beside it")
    for line, text in (
        (0, ""), (1, "val_loss," + head + "1," + row), (1, "\0"), (0, "\udcff"),
        (2, head + row.replace("3", "much")), (2, head + row.replace("3", "nan")),
        (2, head + "idea,1\n"), (3, head + row + row),
    ):  # fmt: skip
        csv.write_bytes(content := text.encode(errors="surrogateescape"))
        refuse(words=f"runs.csv: line {line}: ")
        assert csv.read_bytes() == content and made.read_text() == "# my own"


def test_committed_tables_come_out_of_their_runs_byte_for_byte():
    made = (ROOT / "studies").rglob("table.md")
    tables = [path for path in made if path.with_name("runs.csv").exists()]
    for path in tables:
        reference = "scratch_flops" if "challenge" in path.parts else "idea"
        arms = results.read_csv(path.with_name("runs.csv"))
        assert results.table(arms, reference) == path.read_text(), path
    assert len(tables) > 3


def test_p_values_match_closed_forms_and_the_table_of_student():
    for differences, p in (
        ([-1.0, -2.0, -3.0], 0.07417990022744858),  # 2 sqrt(3), two: 1 - t / sqrt(2 + t^2)
        # Student's table: two-sided 5% at 4 degrees of freedom is 2.776445
        ([x + 2.776445105 * math.sqrt(0.5) for x in (-2.0, -1.0, 0.0, 1.0, 2.0)], 0.05),
        ([0.5, 0.5, 0.5], 0.0),
    ):
        assert results.t_test(differences) == pytest.approx(p, rel=1e-8)


def test_the_table_holds_mean_spread_and_paired_difference():
    losses = {"naive": {1: 3.1, 2: 3.4}, "idea": {1: 3.0, 2: 3.2}, "late": {2: 3.1}}
    lines = results.table(arms_of(losses), "idea").splitlines()
    assert lines[2].startswith("| late | 1 | 3.1000 | 7.0000 | -0.1000 |")
    assert lines[3].startswith("| idea | 2 | 3.1000 ± 0.1414 | 7.0000 ± 0.0000 |  |")
    assert lines[4].startswith("| naive | 2 | 3.2500 ± 0.2121 | 7.0000 ± 0.0000 | +0.1500 (0.2) |")
    assert lines[-1] == "Arms have different seeds: compare the differences, not the losses."
