import importlib.util
import math
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from test_run import ROOT, run, same_end, toy, wait_until  # noqa: F401 (toy is a fixture)

from run.checkpoint import load_checkpoint, read_log
from run.config import ConfigError
from tools import arms as arms_tool
from tools import compare, results
from tools.results import CURVE_COLUMNS, RUN_COLUMNS

ARMS = {
    "idea": "",
    "oneshot": "prune_schedule = 'oneshot'",
    "enlarged": "d_ff_target = 0; n_kv_head_target = 0",
    "scratch_flops": "d_ff = 8; n_head = 1; n_kv_head = 1; head_dim = 4; "
    "d_ff_target = 0; n_kv_head_target = 0; match_flops = r'{folder}/idea.py'",
}


@pytest.fixture(scope="module")
def arms(toy, tmp_path_factory) -> list[str]:  # noqa: F811
    folder = tmp_path_factory.mktemp("arms")
    for name, lines in ARMS.items():
        text = toy.read_text() + "score_beta = 0.0\n" + lines.format(folder=folder) + "\n"
        (folder / f"{name}.py").write_text(text)
    return [str(folder / f"{name}.py") for name in ARMS]


def tool(arms: list[str], tmp_path: Path) -> list[str]:
    where = [f"--out={tmp_path / 'results'}", f"--runs={tmp_path / 'runs'}"]
    return [*arms, *where, "--seeds=1", "--jobs=2", "--eval_every=5"]


def test_ctrl_c_saves_what_runs_and_starts_nothing_else(arms, tmp_path):
    many = "--max_steps=90000"  # 36000 to the first prune: far more than fit between two looks
    command = [sys.executable, "-m", "tools.compare", *tool(arms, tmp_path), many]
    # A shell that runs the tests in the background has them ignore it
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=listens
    ) as process:
        trunk = tmp_path / "runs" / "trunks" / "idea" / "1"
        wait_until(process, (trunk / "log.jsonl").exists)
        process.send_signal(signal.SIGINT)
        error = process.communicate()[1]
    assert process.returncode == 130 and "stopped; the same command goes on" in error
    assert 0 < load_checkpoint(trunk / "checkpoint.pt")["step"] < 36000
    assert not list((tmp_path / "runs").glob("[a-z]*/1/log.jsonl"))


def test_killed_it_continues_and_shared_stretches_change_no_bit(arms, tmp_path, capsys):
    command = [sys.executable, "-m", "tools.compare", *tool(arms, tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        trunk = tmp_path / "runs" / "trunks" / "idea" / "1"
        wait_until(process, (trunk / "log.jsonl").exists)
        process.kill()  # what it has started goes on, and holds its out_dir
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert load_checkpoint(trunk / "checkpoint.pt")["step"] < 13  # it stopped before the prune
    for name in ("idea", "oneshot"):
        straight = tmp_path / name
        config = next(a for a in arms if Path(a).stem == name)
        assert run(config, straight, "--eval_every=5") == 0
        assert same_end(tmp_path / "runs" / name / "1", straight)
        assert [e["step"] for e in read_log(tmp_path / "runs" / name / "1") if e.get("resumed")]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("checkpoint.pt")}
    assert compare.main(tool(arms, tmp_path)) == 0
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("checkpoint.pt")}

    rows = results.read_csv(tmp_path / "results" / "runs.csv")
    assert [row["arm"] for row in rows] == list(ARMS)
    flops = {row["arm"]: row["flops"] for row in rows}
    steps = load_checkpoint(tmp_path / "runs" / "scratch_flops" / "1" / "checkpoint.pt")["step"]
    assert abs(flops["scratch_flops"] - flops["idea"]) < flops["scratch_flops"] / steps
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("runs.csv", "curves.csv"):
        shutil.copy(tmp_path / "results" / name, copy)
    assert results.main([str(copy)]) == 0
    assert (copy / "table.md").read_bytes() == (tmp_path / "results" / "table.md").read_bytes()
    if importlib.util.find_spec("matplotlib"):
        for name in ("curves.png", "curves.svg"):
            assert (copy / name).read_bytes() == (tmp_path / "results" / name).read_bytes()

    edited = [str(tmp_path / Path(arm).name) for arm in arms]
    for arm, path in zip(arms, edited):
        Path(path).write_text(Path(arm).read_text() + "weight_decay = 0.2\n")
    assert compare.main(tool(edited, tmp_path)) == 2
    error = capsys.readouterr().err
    assert "made by another config (weight_decay=0.1 there, 0.2 in" in error
    assert compare.main([*tool(arms, tmp_path), "--dtype=bfloat16"]) == 2
    assert "dtype='float32' there" in capsys.readouterr().err

    two = [arm for arm in arms if Path(arm).stem in ("idea", "oneshot")]
    assert compare.main(tool(two, tmp_path)) == 0  # the others' rows stay
    names = [row["arm"] for row in results.read_csv(tmp_path / "results" / "runs.csv")]
    assert sorted(names) == sorted(ARMS)


def test_the_results_hold_every_seed_that_is_done(arms, tmp_path):
    path = [a for a in arms if Path(a).stem == "idea"]
    knobs = ["--jobs=2", "--max_steps=20", "--warmup_steps=2", f"--out={tmp_path / 'r'}"]
    for seeds in (2, 1):
        assert compare.main([*path, *knobs, f"--runs={tmp_path / 'runs'}", f"--seeds={seeds}"]) == 0
    rows = results.read_csv(tmp_path / "r" / "runs.csv")
    assert [row["seed"] for row in rows] == [1, 2]


def test_a_shorter_comparison_keeps_its_seeds_and_folder_and_says_what_it_proves(
    arms, tmp_path, capsys
):
    idea = [arm for arm in arms if Path(arm).stem == "idea"]
    command = [*tool(idea, tmp_path), "--shorter=2", "--seeds=2"]
    assert compare.main(command) == 0
    assert "2 times shorter than their configs: this proves nothing" in capsys.readouterr().out
    rows = results.read_csv(tmp_path / "results" / "runs.csv")
    assert [(row["seed"], row["tokens"]) for row in rows] == [(1, 15 * 8 * 16), (2, 15 * 8 * 16)]
    assert compare.main([*command, "--shorter=0"]) == 2
    assert "shorter='0'" in capsys.readouterr().err


def test_shorter_shipped_arms_stay_comparable():
    for folder, extra in (("configs/compare", []), ("configs", ["--prune_every=50"])):
        names = ["idea", "scratch", "scratch_flops", "naive", "oneshot", "enlarged"]
        paths = [str(ROOT / folder / f"{name}.py") for name in names]
        loaded = arms_tool.load_arms(paths, [*extra, "--shorter=8"], "idea")
        idea, equal = loaded[0], loaded[names.index("scratch_flops")]
        assert idea.config.max_steps in (125, 500) and len(idea.plan.shapes) > 1
        assert equal.kind == "same FLOPs" and equal.config.max_steps > idea.config.max_steps


def test_the_plan_counts_a_shared_stretch_once(arms, capsys, tmp_path):
    assert compare.main([*arms, "--out=x", f"--runs={tmp_path / 'runs'}", "--plan=1e9"]) == 0
    text = capsys.readouterr().out
    loaded = {a.name: a for a in arms_tool.load_arms(arms, [], "idea")}
    whole = 3 * sum(a.plan.flops for a in loaded.values())
    enlarged = loaded["enlarged"]
    twice = 3 * 2 * 7 * enlarged.plan.flops / enlarged.config.max_steps  # steps 1 to 7, three arms
    assert f"3 seeds: {whole - twice:.3g} FLOPs" in text
    assert f"{(whole - twice) / 1e9 / 3600:.3g} hours" in text and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["ablations", "default", "main"])
def test_committed_tables_come_out_of_their_runs_byte_for_byte(name):
    folder = ROOT / "results" / name
    rows = results.read_csv(folder / "runs.csv")
    assert results.table(rows, "idea") == (folder / "table.md").read_text()


@pytest.mark.parametrize(
    "line, word", [("d_ff_target = 16", "parameters"), ("max_steps = 40", "tokens")]
)
def test_arms_that_cannot_be_compared_are_refused_by_name(line, word, arms, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(Path(arms[0]).read_text() + line + "\n")
    with pytest.raises(ConfigError, match=f"other.py.*{word}.*not comparable"):
        arms_tool.load_arms([arms[0], str(other)], [], "idea")


def test_arms_of_other_flops_or_another_shape_of_equal_size_are_refused(arms, tmp_path):
    idea, equal = arms[0], Path(arms[3]).read_text()
    (tmp_path / "longer.py").write_text(equal.replace("/idea.py", "/oneshot.py"))
    with pytest.raises(ConfigError, match="longer.py: not on as many FLOPs as .*idea.py"):
        arms_tool.load_arms([idea, str(tmp_path / "longer.py")], [], "idea")
    scratch = equal.partition("match_flops")[0]
    (tmp_path / "alike.py").write_text(scratch)
    arms_tool.load_arms([idea, str(tmp_path / "alike.py")], [], "idea")
    # 16 x 4 weights in each of q, k, v, o, or 16 x 6 in q and o and 16 x 2 in k and v: as many
    (tmp_path / "other.py").write_text(scratch + "n_head = 3; head_dim = 2\n")
    same = r"other.py: ends with ([\d,]+) parameters, .* with \1, or in another shape"
    with pytest.raises(ConfigError, match=same):
        arms_tool.load_arms([idea, str(tmp_path / "other.py")], [], "idea")


def rows_of(losses: dict[str, dict[int, float]]) -> tuple[list[dict], list[dict]]:
    pairs = [(arm, seed, loss) for arm, seeds in losses.items() for seed, loss in seeds.items()]
    runs, curves = (
        [dict.fromkeys(names, 7) | {"arm": a, "seed": s, "val_loss": x} for a, s, x in pairs]
        for names in (RUN_COLUMNS, CURVE_COLUMNS)
    )
    return runs, curves


def test_several_calls_make_one_table_and_other_runs_of_the_reference_are_refused(tmp_path):
    first = {"idea": {1: 3.5, 2: 3.25}, "naive": {1: 3.75, 2: 3.5}, "oneshot": {1: 4.0}}
    results.write(tmp_path, *rows_of(first))
    bytes_before = (tmp_path / "runs.csv").read_bytes()
    fewer = rows_of({"idea": {1: 3.5}, "naive": {1: 3.75}})
    runs, curves = compare.with_others(tmp_path, *fewer, "idea")
    assert sorted((r["arm"], r["seed"]) for r in runs) == [
        ("idea", 1), ("idea", 2), ("naive", 1), ("naive", 2), ("oneshot", 1),
    ]  # fmt: skip
    assert len(curves) == len(runs)
    results.write(tmp_path, runs, curves)
    lines = (tmp_path / "runs.csv").read_bytes().splitlines()
    assert sorted(lines) == sorted(bytes_before.splitlines())
    with pytest.raises(RuntimeError, match="other runs of idea, seed 1; give another --out"):
        compare.with_others(tmp_path, *rows_of({"idea": {1: 3.50001}}), "idea")
    with pytest.raises(RuntimeError, match="other runs; give another --out"):
        compare.with_others(tmp_path, *rows_of({"idea": {3: 3.5}}), "idea")
    runs, curves = rows_of({"idea": {1: 3.5}, "oneshot": {2: 4.0}})
    runs[1]["flops"] = 8  # seed 1 of this arm is of an older config
    with pytest.raises(RuntimeError, match="other runs of oneshot; give another --out"):
        compare.with_others(tmp_path, runs, curves, "idea")


def test_an_arm_that_fails_stops_no_other_and_what_is_done_is_written(arms, tmp_path, capsys):
    paths = [arm for arm in arms if Path(arm).stem in ("idea", "scratch_flops")]
    lower = tmp_path / "lower.py"
    lower.write_text(Path(paths[0]).read_text() + "learning_rate = 1e-3\n")
    old = tmp_path / "runs" / "scratch_flops" / "1" / "config.json"
    old.parent.mkdir(parents=True)
    old.write_text('{"weight_decay": 0.2}')
    assert compare.main(tool([*paths, str(lower)], tmp_path)) == 2
    assert "made by another config (weight_decay=0.2 there" in capsys.readouterr().err
    names = [row["arm"] for row in results.read_csv(tmp_path / "results" / "runs.csv")]
    assert names == ["idea", "lower"]


def test_only_runs_that_learn_alike_share_a_stretch(arms, tmp_path):
    naive = tmp_path / "naive.py"
    naive.write_text(Path(arms[1]).read_text() + "lr_restart = True\n")
    loaded = {a.name: a for a in arms_tool.load_arms([*arms, str(naive)], [], "idea")}
    shared = lambda a, b: arms_tool.shared_steps(loaded[a], loaded[b])  # noqa: E731
    assert shared("enlarged", "scratch_flops") == 0
    assert shared("idea", "oneshot") == shared("idea", "enlarged") == 13 - 5 - 1
    assert shared("enlarged", "enlarged") == 29
    assert shared("naive", "idea") == 3  # another cosine: only the warm-up is the same


@pytest.mark.parametrize(
    "differences, p",
    [
        ([1.0, 3.0], 0.29516723530086653),  # t = 2, one degree of freedom: 1 - 2 atan(2) / pi
        ([1.0, 2.0, 3.0], 0.07417990022744858),  # t = 2 sqrt(3), two: 1 - t / sqrt(2 + t^2)
        ([-1.0, -2.0, -3.0], 0.07417990022744858),
        ([1.0, -1.0], 1.0),
        ([0.5, 0.5, 0.5], 0.0),
    ],
)
def test_p_values_match_closed_forms(differences, p):
    assert results.t_test(differences) == pytest.approx(p, abs=1e-9)
    assert math.isnan(results.t_test([1.0]))


def test_p_value_matches_the_table_of_student():
    """The two-sided 5% point at 4 degrees of freedom is 2.776445."""
    t, n = 2.776445105, 5
    shape = [-2.0, -1.0, 0.0, 1.0, 2.0]  # mean 0, standard deviation sqrt(2.5)
    shift = t * math.sqrt(2.5 / n)
    assert results.t_test([x + shift for x in shape]) == pytest.approx(0.05, abs=1e-8)


def test_table_holds_mean_spread_and_paired_difference():
    row = dict.fromkeys(results.RUN_COLUMNS, 1.0)
    losses = {"idea": [3.0, 3.2], "naive": [3.1, 3.4]}
    rows = [
        row | {"arm": arm, "seed": seed, "val_loss": loss}
        for arm, values in losses.items()
        for seed, loss in enumerate(values, start=1)
    ]
    lines = results.table(rows, "idea").splitlines()
    assert lines[2].startswith("| idea | 2 | 3.1000 ± 0.1414 |")
    assert lines[3].startswith("| naive | 2 | 3.2500 ± 0.2121 | 1.0000 ± 0.0000 | +0.1500 (0.2) |")
