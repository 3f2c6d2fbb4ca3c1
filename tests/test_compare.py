"""The comparison: which arms compare, their runs, and their table."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import run, same_end

from data.command import UserError
from run.log import read_log
from tools import compare
from tools.compare import COLUMNS, load_arms, read_csv, t_test, write

SCRATCH = dict(d_ff=8, n_head=1, n_kv_head=1, head_dim=4, d_model=8, n_layer=2)
SCRATCH |= dict(d_ff_target=0, n_kv_head_target=0, d_model_target=0, n_layer_target=0)
TABLE = f"setting,{','.join(COLUMNS)}\n"
TABLE += "".join(
    f",{row},7.0,7,7,7,7.0,7.0\n"
    for row in ("idea,1,3.5", "idea,2,3.25", "naive,1,3.75")
)


@pytest.fixture(scope="module")
def idea(toy) -> str:
    return str(shutil.copy(toy, toy.with_name("idea.py")))


def table(idea: str, arms: dict) -> str:
    (path := Path(idea).with_name("arms.py")).write_text(
        f"base = {idea!r}\narms = {arms}\n"
    )
    return f"{path}:arms"


def call(folder: Path, *arguments: str) -> list[str]:
    return [
        *arguments,
        f"--out={folder / 'results'}",
        f"--runs={folder / 'runs'}",
        "--seeds=1",
    ]


def test_an_arm_of_a_table_is_its_base_with_its_changes_and_knobs(idea):
    path = table(idea, {"oneshot": {"prune_schedule": "oneshot"}, "other": {}})
    base, one = load_arms([idea, f"{path}:oneshot"], ["--d_model=32"], "idea")
    assert (base.setting, one.setting, base.config.d_model) == ("", "arms", 32)
    assert one.config == replace(base.config, prune_schedule="oneshot")


# 8 x 4 weights in each of q, k, v, o: one head, or two
NOT_THESE = [("other", SCRATCH | {"n_head": 2, "n_kv_head": 2, "head_dim": 2})]
NOT_THESE += [("other", {"d_fff": 3})]
NOT_THESE += [("other", {"seed": 7}), ("other", {"out_dir": "x"}), ("idea", {})]
NOT_THESE += [("other", {"eval_tokens": 100}), ("other", {"dtype": "bfloat16"})]
NOT_THESE += [(name, {}) for name in ("../../esc", "..", "", 3, "a|b")]


@pytest.mark.parametrize("name, changes", NOT_THESE)
def test_an_arm_that_cannot_be_compared_is_refused(name, changes, idea):
    with pytest.raises(UserError, match="other|idea|arms.py:"):
        load_arms([idea, table(idea, {name: changes})], [], "idea")


def test_an_arm_has_the_tokens_or_the_flops_of_the_reference(idea):
    def load(steps: int) -> None:
        load_arms(
            [idea, table(idea, {"other": SCRATCH | {"max_steps": steps}})], [], "idea"
        )

    with pytest.raises(UserError) as error:
        load(500)
    steps = int(
        str(error.value).partition("max_steps=")[2].split()[0]
    )  # it says how many
    load(steps), load(30)
    for other in (steps - 3, steps + 3):
        with pytest.raises(UserError, match=f"max_steps={steps} "):
            load(other)


def test_interrupted_it_goes_on_and_what_is_done_is_not_run_again(
    idea, tmp_path, capsys, refused
):
    out, first = tmp_path / "results", tmp_path / "runs" / "idea" / "1"
    command = call(tmp_path, idea, "--dtype=auto")
    assert run(Path(idea), first, "--dtype=auto", "--stop_after=12") == 0
    assert compare.main(command) == 0, capsys.readouterr().err
    assert run(Path(idea), tmp_path / "straight", "--dtype=auto") == 0
    assert same_end(first, tmp_path / "straight")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.*")}
    assert compare.main(command) == 0
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.*")}
    done, row = read_log(first)[-1], read_csv(out / "runs.csv")[""]["idea"][1]
    assert all(
        row[key] == done[key] for key in ("val_loss", "params", "tokens", "flops")
    )
    # All seeds that are there count, and must compare
    second = shutil.copytree(first, first.with_name("2"))
    assert compare.main([*command, "--seeds=2-2"]) == 0
    assert read_csv(out / "runs.csv") == {"": {"idea": {1: row, 2: row | {"seed": 2}}}}
    other = shutil.copy(idea, Path(idea).with_name("other.py"))
    # What would lose a result is refused before the first run
    for call_without in (command, call(tmp_path, other, "--reference=other")):
        lost = [*call_without, f"--runs={tmp_path / 'x'}"]
        refused("its idea, seed 1, loss", *lost, main=compare.main)
    assert not (tmp_path / "x").exists()
    for name, old, new in (
        ("log.jsonl", '"data": "', '"data": "other'),
        ("log.jsonl", '"teacher": "', '"teacher": "other'),
        ("log.jsonl", '"init_from": "', '"init_from": "other'),
        ("log.jsonl", '"code": "', '"code": "other'),
        ("log.jsonl", '"torch": ', '"changed": {"seed": [1, 2]}, "torch": '),
        ("config.json", '"dtype": "', '"dtype": "not '),
        ("config.json", '"weight_decay": 0.1', '"weight_decay": 0.2'),
    ):
        text = (second / name).read_text()
        (second / name).write_text(text.replace(old, new))
        refused(f"{second}: ", *command, main=compare.main)
        (second / name).write_text(text)


def test_an_arm_that_fails_stops_no_other_and_other_tables_stay(idea, tmp_path, capsys):
    (other := tmp_path / "runs" / "other" / "1").mkdir(parents=True)
    (other / "checkpoint.pt").write_text("of another program")
    (path := tmp_path / "results" / "runs.csv").parent.mkdir()
    path.write_text(TABLE)
    before = read_csv(path)
    arms = table(idea, {"other": {"learning_rate": 2e-3}})
    for _ in range(2):
        assert compare.main(call(tmp_path, arms, idea, "--jobs=2", "--shorter=2")) == 1
    said = capsys.readouterr().out.replace("\\", "/")
    assert (
        said.count("other/1 has ended, exit code 2") == 2
        and said.count("idea/1 has") == 1
    )
    tables = read_csv(path)
    assert tables[""] == before[""] and tables["arms"].keys() == {"idea"}
    assert tables["arms"]["idea"][1]["tokens"] == 15 * 128


def test_a_table_is_written_as_it_was_read_and_printed(tmp_path, capsys):
    (path := tmp_path / "runs.csv").write_text(TABLE)
    write(again := tmp_path / "new" / "runs.csv", read_csv(path))
    assert again.read_text() == TABLE
    assert compare.main([f"--out={tmp_path}"]) == 0
    assert (
        "\n| naive | 1 | 3.7500 | 7.0000 | +0.2500 (nan) | " in capsys.readouterr().out
    )


def test_what_is_no_result_is_refused_and_not_replaced(
    idea, tmp_path, monkeypatch, refused
):
    monkeypatch.setenv("HOME", str(tmp_path))  # which is ~
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    for wrong in ("--seed=2", "--stop_after=9", "--out_dir=x"):
        refused(wrong, "configs/idea.py", "--out=x", wrong, main=compare.main)
    (csv := tmp_path / "mine" / "runs.csv").parent.mkdir()
    for text in (
        "a,b\n1,2\n",
        TABLE.replace("3.5", "much"),
        TABLE + ",idea,3\n",
        "\udcff",
    ):
        csv.write_bytes(content := text.encode(errors="surrogateescape"))
        for configs in ([], [idea]):
            refused("runs.csv: line ", *configs, "--out=~/mine", main=compare.main)
        assert csv.read_bytes() == content


def test_p_values_match_the_table_of_student():
    differences = [
        x + 2.776445105 * 0.5**0.5 for x in (-2.0, -1.0, 0.0, 1.0, 2.0)
    ]  # 5%, 4 df
    assert t_test(differences) == pytest.approx(0.05, rel=1e-8)
