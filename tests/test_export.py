"""Our model as a Hugging Face folder, and a folder as our model."""

import json
import random
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from test_faults import file_size_limit  # noqa: E402
from test_run import TOY, events  # noqa: E402

import train as train_module  # noqa: E402
from data.loader import TokenDataset  # noqa: E402
from data.prepare import prepare  # noqa: E402
from data.tokenizer import END_OF_TEXT, load_tokenizer  # noqa: E402
from experiments.smollm2 import convert as smollm2  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from run.checkpoint import CheckpointError, load_checkpoint, load_model, write_checkpoint  # noqa: E402
from run.llama import config_json, load_folder, save_weights, write_json  # noqa: E402
from tools import evaluate, export, sample  # noqa: E402
from tools.load import load_run  # noqa: E402

V = 1024  # of the shipped tokenizer
SHAPES = {
    "grouped": GPTConfig(V, 32, 32, 8, 2, [2, 2], [24, 24]),
    "uneven": GPTConfig(V, 32, 32, 8, 2, [1, 2], [8, 40], tie_embeddings=False),
    "padded vocabulary": GPTConfig(V + 64, 32, 32, 8, 4, [1, 1], [24, 24]),
    "theta and eps": GPTConfig(V, 32, 32, 8, 1, [4], [16], rope_theta=500.0, norm_eps=0.1),
    "three heads": GPTConfig(V, 32, 32, 8, 1, [3], [16]),  # do not divide d_model: padded to 4
}
HARD_TEXTS = [
    "", " ", "   two  spaces\n\n\n\tand\r\nline ends ", "I'LL don't 'S x1² 1234567",
    "".join(map(chr, range(256))), "😀👩‍👩‍👧 ünï\u0301 漢字 \u2028\u0085\u00a0\ufeff",
    f"before {END_OF_TEXT} after{END_OF_TEXT}", "aaaaaaa" * 20,
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    texts = [f"The sum of {a} and {b} is {a + b}. " * 3 for a in range(15) for b in range(15)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    prepare([folder / "text.jsonl"], "shipped", folder / "shipped")
    return folder


def make(shape: GPTConfig) -> GPT:
    torch.manual_seed(0)
    model = GPT(shape)
    for p in model.parameters():  # large, so that no part hides behind small numbers
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.3)
    return model


def make_run(out: Path, data: Path, model: GPT) -> Path:
    """An out_dir as train.py leaves it, as far as export reads it."""
    out.mkdir()
    state = {
        "format": "enlarge-prune 1",
        "config": json.dumps(TOY | {"data_dir": str(data), "criterion": "sensitivity"}),
        "model_config": json.dumps(vars(model.shape())),
        **{"step": 30, "tokens": 3840, "flops": 10**9},
        "model": dict(model.state_dict()),
    }
    write_checkpoint(out / "checkpoint.pt", state)
    return out


def exported(tmp_path: Path, data: Path, model: GPT) -> Path:
    out, folder = make_run(tmp_path / "run", data / "shipped", model), tmp_path / "folder"
    assert export.main([str(out), "--to", str(folder)]) == 0
    return folder


@pytest.fixture
def folder(tmp_path, data) -> Path:
    return exported(tmp_path, data, make(SHAPES["grouped"]))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_exported_model_has_the_same_logits_and_generates(shape, tmp_path, data):
    model = make(shape)
    folder = exported(tmp_path, data, model)
    theirs, how = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert type(theirs) is transformers.LlamaForCausalLM
    assert not any(how[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x = torch.randint(0, V, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, model(x), rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # and so does our own reading of the folder
        ours = load_model(load_folder(folder))
        torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The sum of", return_tensors="pt")
    tokens = theirs.generate(**prompt, max_new_tokens=8, do_sample=False)[0]
    assert tokenizer.decode(tokens).startswith("The sum of") and tokens.max() < V


def test_generate_leaves_the_tokens_that_only_pad_the_vocabulary(tmp_path, data):
    shape = replace(SHAPES["padded vocabulary"], tie_embeddings=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        exported(tmp_path, data, make(shape))
    )
    with torch.no_grad():
        theirs.lm_head.weight.zero_()  # all logits are equal: without a word, any token may come
    tokens = theirs.generate(torch.zeros(8, 1, dtype=torch.long), max_new_tokens=30, do_sample=True)
    assert V // 2 < tokens.max() < V


def test_padding_is_said_and_counted_or_refused(tmp_path, data, capsys):
    out = make_run(tmp_path / "run", data / "shipped", make(SHAPES["uneven"]))
    assert export.main([str(out), "--to", str(tmp_path / "folder"), "--no-pad"]) == 2
    error = capsys.readouterr().err
    assert "[8, 40]" in error and "--no-pad" in error and error.count("\n") == 1
    assert not (tmp_path / "folder").exists()
    assert export.main([str(out), "--to", str(tmp_path / "folder")]) == 0
    neurons, heads = 32 * 3 * 32, (2 * 2 + 2) * 8 * 32  # of the narrower layer
    assert f"{neurons + heads:,} parameters" in (tmp_path / "folder" / "README.md").read_text()
    assert export.main([str(out), "--to", str(tmp_path / "folder")]) == 2  # never over a folder


@pytest.mark.parametrize("size", [100, 25_000])  # the second has room for the weights alone
def test_on_a_full_disk_an_export_is_one_line_and_leaves_nothing(size, tmp_path, data, capsys):
    small = GPTConfig(V, 32, 4, 4, 1, [1], [8])
    out = make_run(tmp_path / "run", data / "shipped", make(small))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    file_size_limit(size)
    try:
        code = export.main([str(out), "--to", str(tmp_path / "folder")])
    finally:
        file_size_limit(resource.RLIM_INFINITY)
        signal.signal(signal.SIGXFSZ, before)
    error = capsys.readouterr().err
    assert code == 2 and f"{tmp_path / 'folder'}: cannot be written: " in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_exported_tokenizer_gives_the_same_ids(folder, data):
    ours = load_tokenizer("shipped")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    draw = random.Random(0)
    texts = list(HARD_TEXTS)
    for _ in range(300):
        end = draw.choice([0x80, 0x300, 0xD800])
        texts.append("".join(chr(draw.randrange(end)) for _ in range(40)))
    for text in texts:
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == ours.encode_ordinary(text), text
        assert theirs.decode(ids) == text
        assert load_tokenizer(str(folder)).encode_ordinary(text) == ids
    assert theirs(END_OF_TEXT)["input_ids"] == [V - 1]  # the default there: special
    assert theirs.eos_token_id == V - 1


def test_an_export_of_an_import_is_the_same_file(tmp_path, data):
    for name in ("grouped", "uneven"):
        (tmp_path / name).mkdir()
        folder = exported(tmp_path / name, data, make(SHAPES[name]))
        model = load_model(load_folder(folder))
        again = make_run(tmp_path / name / "again", data / "shipped", model)
        assert export.main([str(again), "--to", str(tmp_path / name / "second")]) == 0
        for file in ("model.safetensors", "config.json", "tokenizer.json"):
            second = (tmp_path / name / "second" / file).read_bytes()
            assert second == (folder / file).read_bytes(), (name, file)


def test_a_folder_that_transformers_wrote_in_shards_and_16_bits_is_read(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=48, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, head_dim=16, rms_norm_eps=1e-3,
        max_position_embeddings=64, tie_word_embeddings=False, rope_theta=500.0,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.2)
    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        theirs.to(dtype).save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
        model = load_model(load_folder(folder))
        assert model.config.head_dim == 16 and model.config.norm_eps == 1e-3
        assert all(p.dtype == torch.float32 for p in model.parameters())
        x = torch.randint(0, 128, (1, 64))
        with torch.no_grad():
            again = transformers.LlamaForCausalLM.from_pretrained(folder).float()
            torch.testing.assert_close(model(x), again(x).logits, rtol=1e-4, atol=1e-4)


YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}
UNSUPPORTED = {
    "another architecture": ({"model_type": "qwen2"}, ["model_type", "qwen2"]),
    "attention biases": ({"attention_bias": True}, ["attention_bias"]),
    "FFN biases": ({"mlp_bias": True}, ["mlp_bias"]),
    "another activation": ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
    "sliding windows": ({"sliding_window": 64}, ["sliding_window", "64"]),
    "dropout": ({"attention_dropout": 0.1}, ["attention_dropout"]),
    "rope scaling": ({"rope_scaling": {"type": "linear", "factor": 2}}, ["rope_scaling"]),
    "rope scaling of transformers 5": ({"rope_parameters": YARN}, ["rope_parameters", "yarn"]),
    "partial rotation": ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    "quantized": ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
    "its own code": ({"auto_map": {"AutoModel": "x.Y"}}, ["auto_map"]),
    "heads that do not divide": ({"num_key_value_heads": 3}, ["num_key_value_heads", "3"]),
    "no size": ({"hidden_size": None}, ["hidden_size", "None"]),
    "negative size": ({"vocab_size": -1}, ["vocab_size", "-1"]),
    "other sizes than the weights": ({"intermediate_size": 23}, ["gate_proj", "23"]),
    "more layers than weights": ({"num_hidden_layers": 3}, ["model.layers.2"]),
    "fewer layers": ({"num_hidden_layers": 1}, ["model.layers.1"]),
    "an untied embedding that is not there": ({"tie_word_embeddings": False}, ["lm_head.weight"]),
}


@pytest.mark.parametrize("change, words", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(change, words, folder):
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | change)
    with pytest.raises(CheckpointError) as error:
        load_folder(folder)
    assert all(word in str(error.value) for word in [str(folder), *words]), error.value
    assert "\n" not in str(error.value)


def test_weights_that_do_not_belong_or_are_damaged_are_refused(folder, tmp_path):
    path = folder / "model.safetensors"
    tensors, whole = load_file(path), path.read_bytes()
    tensors = {name: w.clone() for name, w in tensors.items()}
    bias = "model.layers.0.self_attn.q_proj.bias"
    save_file(tensors | {bias: torch.zeros(32)}, path)
    with pytest.raises(CheckpointError, match=bias):
        load_folder(folder)
    norm = "model.norm.weight"
    save_file(tensors | {norm: torch.ones(32, dtype=torch.int8)}, path)
    with pytest.raises(CheckpointError, match=f"{norm} is int8"):
        load_folder(folder)
    path.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        load_folder(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="has no model.safetensors"):
        load_folder(folder)
    with pytest.raises(CheckpointError, match="no Hugging Face folder"):
        load_folder(tmp_path)


def test_a_target_is_judged_by_the_shape_of_the_folder_not_of_the_config(tmp_path, data, capsys):
    folder = exported(tmp_path, data, make(replace(SHAPES["grouped"], d_ff=[64, 64])))
    stop = "--stop_after=15"
    assert run(tmp_path / "a", folder, data / "shipped", "--d_ff_target=48", stop) == 0  # TOY: 32
    assert [events(tmp_path / "a", "step")[i]["d_ff"] for i in (0, -1)] == [64, 60]
    capsys.readouterr()
    assert run(tmp_path / "b", folder, data / "shipped", "--d_ff_target=68") == 2
    assert "d_ff=64" in capsys.readouterr().err


def run(out: Path, start: Path, data: Path, *knobs: str) -> int:
    """TOY, from a folder."""
    config = out.with_suffix(".py")
    values = TOY | {"init_from": str(start), "data_dir": str(data), "n_kv_head_target": 0}
    config.write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()))
    return train_module.main([str(config), f"--out_dir={out}", *knobs])


def test_a_folder_is_pruned_exported_and_sampled_with_its_own_tokenizer(
    folder, tmp_path, data, capsys
):
    own = tmp_path / "own"
    prepare([data / "text.jsonl"], str(folder), own)
    shipped, kept = (TokenDataset(d, "val", 8) for d in (data / "shipped", own))
    assert torch.equal(shipped.batch(1, 8, 1)[0], kept.batch(1, 8, 1)[0])
    assert kept.end_of_text == V - 1
    assert run(tmp_path / "pruned", folder, own, "--stop_after=20") == 0
    (folder / "config.json").unlink()  # a resumed run has its weights elsewhere
    assert run(tmp_path / "pruned", folder, own, "--resume") == 0
    steps = events(tmp_path / "pruned", "step")
    assert (steps[0]["d_ff"], steps[-1]["d_ff"]) == (24, 8)
    state = load_checkpoint(tmp_path / "pruned" / "checkpoint.pt")
    assert state["model_config"].n_kv_head == [2, 2]
    capsys.readouterr()
    drawn = ["--prompt", "The sum ☃", "--tokens", "5"]
    assert sample.main([str(tmp_path / "pruned"), *drawn]) == 0
    text = capsys.readouterr().out
    assert text.startswith("The sum ☃") and len(text) > 11
    assert export.main([str(tmp_path / "pruned"), "--to", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert sample.main([str(tmp_path / "out"), *drawn]) == 0  # the folder itself is a run, too
    assert capsys.readouterr().out == text
    same, about = ((tmp_path / "out" / f"tokenizer{x}.json").read_bytes() for x in ("", "_config"))
    assert same == (folder / "tokenizer.json").read_bytes()
    then = json.loads((folder / "tokenizer_config.json").read_bytes())
    assert json.loads(about) == then | {"model_max_length": TOY["context_length"]}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "d_ff per layer | [8, 8]" in card and "validation" in card


def test_theta_and_eps_of_a_folder_stay_with_the_run(tmp_path, data):
    folder = exported(tmp_path, data, make(replace(SHAPES["theta and eps"], tie_embeddings=False)))
    once = ["--stop_after=1", "--learning_rate=1e-9", "--warmup_steps=0", "--d_ff_target=8"]
    assert run(tmp_path / "trained", folder, data / "shipped", *once) == 0
    state = load_checkpoint(tmp_path / "trained" / "checkpoint.pt")
    shape = state["model_config"]
    assert (shape.rope_theta, shape.norm_eps, shape.tie_embeddings) == (500.0, 0.1, False)
    x = torch.randint(0, V, (2, 16))
    with torch.no_grad():
        before, after = load_model(load_folder(folder))(x), load_model(state)(x)
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-3)


def test_starts_that_do_not_fit_end_in_one_line_before_anything_is_written(
    tmp_path, data, capsys, monkeypatch
):
    folder = exported(tmp_path, data, make(SHAPES["padded vocabulary"]))

    def refused(*words: str, start: Path = folder, knobs: tuple = ()) -> None:
        capsys.readouterr()
        assert run(tmp_path / "new", start, data / "shipped", *knobs) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in words), error
        assert not (tmp_path / "new").exists()

    refused("1088", "1024", "--round_vocab_to=68")
    refused(
        "checkpoint.pt", start=make_run(tmp_path / "r", data / "shipped", make(SHAPES["uneven"]))
    )
    monkeypatch.setattr(train_module, "device_memory", lambda device: 2**20)
    refused("memory", knobs=("--round_vocab_to=68",))


def test_a_tokenizer_that_is_not_whole_is_refused_in_one_line(folder, tmp_path):
    from data import DataError

    def refused(words: str) -> None:
        with pytest.raises(DataError, match=words) as error:
            load_tokenizer(str(folder))
        assert "\n" not in str(error.value)

    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    (folder / "tokenizer_config.json").unlink()
    content["added_tokens"][0]["content"] = "<s>"
    content["model"]["vocab"]["<s>"] = content["model"]["vocab"].pop(END_OF_TEXT)
    write_json(path, content)
    refused("nothing ends a text")
    write_json(folder / "tokenizer_config.json", {"eos_token": {"content": "<s>"}})
    assert load_tokenizer(str(folder)).eot_token == V - 1
    path.write_text("{")
    refused("cannot read its tokenizer.json")
    path.unlink()
    refused("has no tokenizer.json")


def test_special_tokens_of_a_tokenizer_from_elsewhere_leave_with_the_model(folder, tmp_path, data):
    about = json.loads((folder / "tokenizer_config.json").read_text())
    about |= {"eos_token": "!", "bos_token": "?", "pad_token": None}
    write_json(folder / "tokenizer_config.json", about)
    prepare([data / "text.jsonl"], str(folder), tmp_path / "own")
    out = make_run(tmp_path / "another", tmp_path / "own", make(SHAPES["grouped"]))
    assert export.main([str(out), "--to", str(tmp_path / "out")]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        ids = json.loads((tmp_path / "out" / name).read_text())
        assert ids["eos_token_id"] == theirs.convert_tokens_to_ids("!") == theirs.eos_token_id
        assert ids["bos_token_id"] == theirs.convert_tokens_to_ids("?")
    assert ids["pad_token_id"] == V - 1


def test_tokens_of_sentencepiece_spell_spaces_and_bytes(tmp_path):
    from tokenizers import Tokenizer, decoders, models

    words = ["<unk>", "</s>", "\u2581the", "\u2581caf", "<0xC3>", "<0xA9>", "<0x0A>", "é"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "</s>"})
    ours = load_tokenizer(str(tmp_path))
    ids = [2, 3, 4, 5, 6, 2, 7]
    assert b"".join(map(ours.decode_single_token_bytes, ids)).decode() == " the café\n theé"
    assert ours.decode(ids) == " the café\n theé"


def test_a_tokenizer_that_would_truncate_and_pad_does_neither(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    cut = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    pad = {"pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    fill = {"strategy": {"Fixed": 8}, "direction": "Right", **pad}
    write_json(folder / "tokenizer.json", content | {"truncation": cut, "padding": fill})
    ours, tokenizer = load_tokenizer("shipped"), load_tokenizer(str(folder))
    for text in ("a", "The sum of 12 and 14 is 26."):
        assert tokenizer.encode_ordinary(text) == ours.encode_ordinary(text)


def test_gguf_rows_of_q_and_k_return_to_the_half_split_order():
    rows = torch.arange(3 * 8).view(24, 1)  # three heads of eight channels, as we have them
    interleaved = rows.view(3, 2, 4, 1).transpose(1, 2).reshape(24, 1)  # as llama.cpp writes them
    assert torch.equal(smollm2.half_split(interleaved, 3), rows)
    assert smollm2.our_name("blk.3.attn_q.weight") == "blocks.3.attention.q.weight"
    assert smollm2.our_name("token_embd.weight") == "embed.weight"


def test_the_smollm2_tokenizer_lets_a_digit_stand_alone(tmp_path):
    letters = [*map(chr, range(0x21, 0x7F)), "Ġ"]
    tokens = [END_OF_TEXT, *letters, "12", "ab"]
    about = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["1 2", "a b"],
        "tokenizer.ggml.token_type": [smollm2.CONTROL] + [1] * (len(tokens) - 1),
    }  # fmt: skip
    write_json(tmp_path / "tokenizer.json", smollm2.tokenizer(about))
    ids = load_tokenizer(str(tmp_path)).encode_ordinary("12 ab")
    assert [tokens[i] for i in ids] == ["1", "2", "Ġ", "ab"]
    with pytest.raises(CheckpointError, match="not SmolLM"):
        smollm2.tokenizer(about | {"tokenizer.ggml.pre": "llama-bpe"})


def test_config_json_says_the_same_to_transformers_4_and_5():
    config = config_json(SHAPES["theta and eps"], 1, 2)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500.0


def test_half_precision_weights_are_written_in_float32(tmp_path):
    shape = SHAPES["grouped"]
    save_weights(tmp_path, shape, dict(make(shape).bfloat16().state_dict()))
    assert {w.dtype for w in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}


def test_scores_agree_with_lm_eval_request_by_request(folder):
    models = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance

    sums = [(a, b) for a in (3, 14) for b in (15, 92)]
    pairs = [(f"The sum of {a} and {b} is", f" {c}.") for a, b in sums for c in (a + b, a)]
    pairs += [("The sum of ", "3"), ("word", " two three"), ("long " * 40, "end"), ("", "The sum")]
    lm = models.HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)
    theirs = lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    run = load_run(folder)
    ours = evaluate.log_likelihoods(run.model, [evaluate.encode_pair(run, *pair) for pair in pairs])
    for pair, (nats, greedy), (their_nats, their_greedy) in zip(pairs, ours, theirs):
        assert nats == pytest.approx(their_nats, abs=1e-3), pair
        assert greedy == their_greedy, pair
