"""The comparison: which arms compare, how their runs come to be, what the table says of them."""

import json
import math
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT, refused, run, same_end

from run import UserError
from run.checkpoint import load_checkpoint
from run.folder import Folder, read_log
from tools import challenge, compare, results
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
    made = {path: path.read_bytes() for path in out.iterdir()}
    (out / "table.md").unlink()  # it comes out of runs.csv
    assert compare.main(command) == 0
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.*")}
    assert made == {path: path.read_bytes() for path in out.iterdir()}
    refused(capsys, results.main, out, "nope", words="no arm 'nope'; it has idea")
    done, (row,) = read_log(tmp_path / "straight")[-1], results.read_csv(out / "runs.csv")
    assert all(row[key] == done[key] for key in ("val_loss", "params", "tokens", "flops"))

    # All seeds that are there count, and must compare
    second = shutil.copytree(first, first.with_name("2"))
    assert compare.main([*command, "--seeds=2-2"]) == 0
    rows = results.read_csv(out / "runs.csv")
    assert [(row["arm"], row["seed"]) for row in rows] == [("idea", 1), ("idea", 2)]
    log, config = (second / name for name in ("log.jsonl", "config.json"))
    lines, then = log.read_text(), json.loads(config.read_text())
    for file, text, words in (
        (log, lines.replace('"data": "', '"data": "of another text, '), "runs of different data"),
        (log, lines.replace("loss_after", "loss_later"), "idea/2: an event of its log is damaged"),
        (config, json.dumps(then | {"dtype": "float16"}), "runs of different precision"),
        (config, json.dumps(then | {"weight_decay": 0.2}), "idea/2: made .*=0.2 there, 0.1 in "),
        (config, "[1", "idea/2: not a run's folder"),
        (config, "[]", "idea/2: not a run's folder"),
    ):
        whole = file.read_text()
        file.write_text(text)
        refused(capsys, compare.main, *command, words=words)
        file.write_text(whole)


def test_an_arm_that_fails_stops_no_other_and_its_own_error_is_shown(
    idea, tmp_path, capsys, monkeypatch
):
    """A process that an older call has left runs in its folder and writes to its output."""
    held = tmp_path / "runs" / "held" / "1"
    folder = Folder(str(held), SimpleNamespace(rank=0))  # locks it
    with open(held / "output.txt", "w") as output:

        def sleep(seconds: float, pause=time.sleep) -> None:
            pause(seconds)
            print("step 5", file=output, flush=True)

        monkeypatch.setattr(compare.time, "sleep", sleep)
        arms = table(idea, held={"learning_rate": 2e-3})
        assert compare.main(call(tmp_path, arms, idea, "--jobs=2", "--shorter=2")) == 1
    folder.lock.close()
    assert "error: out_dir=" in capsys.readouterr().err
    rows = results.read_csv(tmp_path / "results" / "runs.csv")
    assert [(row["arm"], row["tokens"]) for row in rows] == [("idea", 15 * 128)]


@pytest.mark.parametrize("given, seeds", [("5", [1, 2, 3, 4, 5]), ("21-23", [21, 22, 23])])
def test_seeds_are_a_number_or_a_range(given, seeds):
    assert [*compare.seed_range(given)] == seeds


WRONG = ["--jobs=0", "--seeds=0", "--seeds=3-1", "--seeds=-2", "--seeds=1-1000000000000", "--out="]


@pytest.mark.parametrize("wrong", WRONG)
def test_an_argument_that_makes_no_sense_is_one_line(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        compare.main(["configs/idea.py", "--out=x", wrong])
    assert f"error: argument {wrong.partition('=')[0]}: " in capsys.readouterr().err


def rows_of(losses: dict[str, dict[int, float]]) -> list[dict]:
    """Of runs.csv, with 7 in all other columns."""
    pairs = [(arm, seed, loss) for arm, seeds in losses.items() for seed, loss in seeds.items()]
    names = dict.fromkeys(RUN_COLUMNS, 7)
    return [names | {"arm": arm, "seed": seed, "val_loss": loss} for arm, seed, loss in pairs]


def test_results_of_a_run_that_the_call_has_not_got_are_never_lost(tmp_path):
    all_rows = rows_of({"idea": {1: 3.5, 2: 3.25}, "oneshot": {1: 4.0}})
    results.write(tmp_path, all_rows)
    results.write(tmp_path, all_rows := [*all_rows, *rows_of({"naive": {1: 3.75}})])
    other = [*rows_of({"idea": {1: 3.50001}}), *all_rows[1:]]
    for rows, lost in ((all_rows[:2], "oneshot, seed 1"), (other, "idea, seed 1")):
        with pytest.raises(UserError, match=f"holds a run of {lost}, .*give another --out"):
            results.write(tmp_path, rows)
    assert results.read_csv(tmp_path / "runs.csv") == all_rows


HEAD = ",".join(RUN_COLUMNS)
ROW = "idea,1,3,1,7,7,7,7,0"


@pytest.mark.parametrize("name", ["table.md", "runs.csv"])
def test_a_file_of_the_users_is_not_replaced(name, idea, tmp_path, monkeypatch, capsys):
    """Found before a run starts. The ~ of --out=~/mine is the home folder, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    monkeypatch.setattr(compare, "start", None)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("# my own\n")
    refused(capsys, compare.main, idea, "--out=~/mine", words=f"{tmp_path}/mine/{name}: ")
    if name == "table.md":
        (tmp_path / "mine" / "runs.csv").write_text(f"{HEAD}\n{ROW}\n")
        refused(capsys, results.main, "~/mine", words="table.md: not a table of tools.compare")
    assert (tmp_path / "mine" / name).read_text() == "# my own\n"


NO_TABLES = {
    "empty": b"",
    "a column is missing": f"{HEAD[:-11]}\n{ROW[:-2]}\n",
    "a column twice": f"{HEAD},val_loss\n{ROW},1\n",
    "a text": f"{HEAD}\n{ROW.replace('3', 'much')}\n",
    "NaN": f"{HEAD}\n{ROW.replace('3', 'nan')}\n",
    "no FLOPs": f"{HEAD}\n{ROW.replace('7,7,0', '0,7,0')}\n",
    "too few": f"{HEAD}\nidea,1\n",
    "too many": f"{HEAD}\n{ROW},1\n",
    "a run twice": f"{HEAD}\n{ROW}\n{ROW}\n",
    "odd bytes": b"\xff\xfe\x00",
    "a zero byte": f"{HEAD}\n{ROW}\0\n",
}


@pytest.mark.parametrize("text", NO_TABLES.values(), ids=NO_TABLES)
@pytest.mark.parametrize("main", [results.main, challenge.main], ids=["results", "challenge"])
def test_what_is_no_table_of_runs_is_refused_by_line(main, text, tmp_path, capsys):
    text = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "runs.csv").write_bytes(text)
    refused(capsys, main, tmp_path, words="runs.csv: (line [0-3]: |a seed of an arm .* twice)")


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
        assert results.t_test(differences) == pytest.approx(p, rel=1e-8)


def test_the_table_holds_mean_spread_and_paired_difference():
    losses = {"naive": {1: 3.1, 2: 3.4}, "idea": {1: 3.0, 2: 3.2}, "late": {2: 3.1}}
    lines = results.table(rows_of(losses), "idea").splitlines()
    assert lines[2].startswith("| late | 1 | 3.1000 | 7.0000 | -0.1000 |")
    assert lines[3].startswith("| idea | 2 | 3.1000 ± 0.1414 | 7.0000 ± 0.0000 |  |")
    assert lines[4].startswith("| naive | 2 | 3.2500 ± 0.2121 | 7.0000 ± 0.0000 | +0.1500 (0.2) |")
    assert lines[-1] == "Arms have different seeds: compare the differences, not the losses."
