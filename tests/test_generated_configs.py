"""Whatever a config says: it is planned and runs, or it is refused in one line before anything."""

import json
import random
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
from test_run import TOY

from data.prepare import prepare
from run.checkpoint import load_checkpoint
from run.config import Config, ConfigError, check_memory
from train import main

TOY = TOY | {"batch_size": 2, "context_length": 8, "eval_tokens": 8, "score_beta": 0.5}
WRONG_TYPE = {int: ["1.5", "'3'", "None", "True", "[3]", "3j", "10**5000", "max", "{1: 2}"]}
WRONG_TYPE[float] = ["'fast'", "None", "True", "[0.1]", "10**400", "abs", "object()"]
WRONG_TYPE[bool] = ["1", "'yes'", "None", "0.0"]
WRONG_TYPE[str] = ["3", "None", "b'x'", "['cpu']", "print"]
HARD = {int: ["-1", "0", "1", "2", "3", "7", "64", "-(10**12)", "10**12", "2**63 - 1", "2**63"]}
HARD[float] = ["-0.1", "0", "5e-324", "1e-9", "0.3", "0.9999999999", "1 - 1e-16", "1", "1e300"]
HARD[float] += ["float('nan')", "float('inf')", "-float('inf')", "-1e300", "2**63"]
HARD[bool] = ["True", "False"]
HARD[str] = ["''", "' '", "'none'", "'a\\nb'", "'\\0'", "'\\ud800'", "'x' * 300", "'x/' * 3000"]
COMMAND_LINE = ["--{}", "--{}=", "--{}=nan", "--{}=1e999", "--{}={{[]: 1}}", "--{}=((((", "{}=1"]
COMMAND_LINE += ["--{}=" + "9" * 5000, "--{}x=1", "--{}\n=1", "---{}=1"]
SEVERAL = [  # contradictions between fields; an error names what stands behind #, or the first
    "resume = overwrite = True", "n_head = 6", "n_kv_head = 3", "d_model = 12", "head_dim = 3",
    "head_dim = 99999999998", "d_model = 99999999999 * 4", "n_layer = 10**12",
    "d_model = d_ff = 4096; n_layer = 100_000  # n_layer", "batch_size = micro_batch_size = 10**10",
    "batch_size = 9999999999; micro_batch_size = 1", "n_head = n_kv_head = 2**40", "d_ff = 2**50",
    "batch_size = 6; micro_batch_size = 4", "d_ff_target = 64", "d_ff_target = 6", "round_to = 64",
    "d_ff = 33", "n_kv_head_target = 5", "n_kv_head_target = 3", "prune_start = prune_end",
    "prune_start, prune_end = 0.8, 0.4", "prune_start = 0.5; prune_end = 0.51", "prune_every = 13",
    "prune_every = 12", "max_steps = 3; warmup_steps = 0", "warmup_steps = 30", "stop_after = 30",
    "lr_restart = True; d_ff_target = n_kv_head_target = 0",
    "lr_restart = True; warmup_steps = 12  # warmup_steps",
    "learning_rate = 1; weight_decay = 1.5", "score_beta = 0.99", "context_length = 10**6",
    "data_dir = '~/none'  # /none", "init_from = '~/none.pt'  # /none.pt", "match_flops = '.'",
    "device = 'mps'", "d_ff_target = n_kv_head_target = 0; match_flops = __file__  # match_flops",
    "d_ff_target = n_kv_head_target = 0; match_flops = 'none.py'  # match_flops",
    "d_ff_target = n_kv_head_target = 0; match_flops = 'configs/idea.py'  # match_flops",
]  # fmt: skip
BAD_FILES = {  # what the line has to say
    "d_ff =": "SyntaxError", "\0": "null bytes", "\xff\xfe": "mine.py", "1 / 0": "ZeroDivision",
    "raise Exception('one\\ntwo')": "one two", "import sys; sys.exit(0)": "SystemExit",
    "exit('bye')": "bye", "raise KeyboardInterrupt": "KeyboardInterrupt", "(" * 500: "mine.py",
    "raise GeneratorExit": "GeneratorExit", "f = lambda: f(); f()": "RecursionError",
    "class E(BaseException): pass\nraise E('x')": "E: x", "import none": "ModuleNotFoundError",
    "from configs.none import *": "ModuleNotFoundError", "import os; os.stat('gone')": "gone",
    "D_FF = 3": "d_ff", "learningrate = 1.0": "learning_rate", "n_layers = 2": "n_layer",
    "for i in range(3): pass": "'i'", "é = 1": "'é'", "d_fff = 'x' * 10**6": "d_ff",
    "d_ff = [0] * 10**6": "d_ff", "class d_ff: pass": "d_ff", "print('hi'); seed = -1": "seed",
}  # fmt: skip


FOUND = ("data_dir", "init_from")  # errors name the file or folder that was looked for


def cases():
    """(assignments for the config file, command line, words of which an error has to say one)."""
    for i, (key, kind) in enumerate(get_type_hints(Config).items()):
        wrong = [WRONG_TYPE[kind][(i + j) % len(WRONG_TYPE[kind])] for j in range(3)]
        for value in wrong + HARD[kind]:
            if (key, value) != ("max_steps", "64"):
                yield f"{key} = {value}", [], (key, value.strip("'") if key in FOUND else key)
        for j in range(3):
            argument = COMMAND_LINE[(i + j) % len(COMMAND_LINE)].format(key)
            yield "", [argument], (key, argument.partition("=")[2] if key in FOUND else key)
    for text in SEVERAL:
        yield text, [], (text.partition("  # ")[2] or text.split(" ")[0].rstrip(","),)
    for text, word in BAD_FILES.items():
        yield text, [], (word,)
    for argument in ("--=1", "--", ""):
        yield "", [argument], ("''",)


CASES = list(cases())
assert len(CASES) > 700


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "data"
    text = folder.with_name("a.jsonl")
    text.write_text("".join(json.dumps({"text": f"{a} and {a}"}) + "\n" for a in range(500)))
    prepare([text], "shipped", folder)
    return folder


@pytest.fixture
def attempt(data_dir, tmp_path, monkeypatch, capsys):
    """Run a config: 0 where it ran, 2 where it was refused as it should be."""

    def run(text: str, arguments: list[str], words: tuple[str, ...], **knobs) -> int:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setitem(sys.modules, "wandb", None)  # it would ask the network
        knobs = TOY | {"out_dir": str(tmp_path / "run"), "data_dir": str(data_dir)} | knobs
        content = "".join(f"{key} = {value!r}\n" for key, value in knobs.items()) + text
        Path("mine.py").write_bytes(content.encode("latin-1" if "\xff" in text else "utf-8"))
        code = main(["mine.py", *arguments])
        error = capsys.readouterr().err
        if code == 0:
            assert error == "" and len(list(tmp_path.rglob("checkpoint.pt"))) == 1
        else:
            assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
            assert any(word in error for word in words) and len(error) < 1000, error
            assert {path.name for path in tmp_path.iterdir()} == {"mine.py"}
        return code

    return run


# Every third by default, all of them with -m "slow or not slow".
SOME = [
    pytest.param(*case, marks=[] if i % 3 == 0 or case[0] in BAD_FILES else pytest.mark.slow)
    for i, case in enumerate(CASES)
]


@pytest.mark.parametrize("text, arguments, words", SOME, ids=lambda x: ascii(x)[:40])
def test_one_wrong_thing_is_refused_in_one_line_or_runs(text, arguments, words, attempt):
    code = attempt(text, arguments, words, stop_after=0 if "stop_after" in text else 2)
    assert code == 2 or text not in BAD_FILES


@pytest.mark.parametrize("seed", range(60))
def test_what_is_accepted_runs_to_its_end(seed, attempt, tmp_path):
    """Prunes of every kind: nothing that could be said before step 1 is said at a prune."""
    draw = random.Random(seed).choice
    knobs = {
        "max_steps": draw([8, 12]), "warmup_steps": draw([0, 2]), "n_layer": draw([1, 2, 3]),
        "n_head": draw([4, 8]), "n_kv_head": draw([1, 2, 4, 4]), "head_dim": draw([0, 2, 6]),
        "d_ff": draw([8, 12, 33]), "d_ff_target": draw([0, 4, 8, 8, 33]), "round_to": draw([1, 4]),
        "n_kv_head_target": draw([0, 1, 1, 2]), "prune_every": draw([1, 1, 2, 3]),
        "prune_start": draw([0.1, 0.2, 0.5]), "prune_end": draw([0.5, 0.75, 0.9]),
        "prune_schedule": draw(["cubic", "linear", "oneshot"]), "lr_restart": draw([0, 0, 1]) == 1,
        "scope": draw(["layer", "global"]), "layer_floor": draw([0.0, 0.25, 1.0]),
        "criterion": draw(["sensitivity", "activation", "magnitude", "random"]),
        "score_beta": draw([0.0, 0.5, 0.9]), "tie_embeddings": draw([False, True]),
        "micro_batch_size": draw([0, 1, 2]), "eval_every": draw([3, 10**12]),
        "dtype": draw(["float32", "bfloat16"]), "grad_clip": draw([0.0, 1e-9, 1.0]),
    }  # fmt: skip
    if attempt("", [], tuple(knobs), **knobs) == 0:
        shape = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["model_config"]
        for key in ("d_ff", "n_kv_head"):
            target = (knobs[key + "_target"] or knobs[key]) * knobs["n_layer"]
            assert sum(getattr(shape, key)) == target


def test_memory_is_counted_before_it_is_taken_and_the_key_to_blame_is_named():
    check_memory(Config(), 1024, 2**27)
    for key, value in {"d_model": 2**20, "n_layer": 10**9, "batch_size": 10**9, "d_ff": 2**30,
                       "head_dim": 2**30, "context_length": 2**40}.items():  # fmt: skip
        with pytest.raises(ConfigError, match=f"^{key}={value}: .* GiB"):
            check_memory(Config(**{key: value}), 1024, 2**35)
    check_memory(Config(batch_size=2**20, micro_batch_size=1), 1024, 2**32)
