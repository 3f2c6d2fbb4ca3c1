"""Our model as a Hugging Face folder, and such a folder as a checkpoint."""
# ruff: noqa: E402 (imports after importorskip)

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

safetensors = pytest.importorskip("safetensors.torch")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from helpers import run, train
from test_model import SHAPES, large

from data.prepare import prepare
from data.tokenizer import END_OF_TEXT, load_tokenizer
from model import GPT, load_checkpoint
from tools import Trained, export, import_hf, sample

V = 1024  # of the shipped tokenizer
SIZE = {"vocab_size": V, "context_length": 32}
BASE = replace(SHAPES["tied"], **SIZE, d_model=32, head_dim=8)
WIDE = replace(SHAPES["wide heads"], **SIZE, d_model=48, head_dim=16)
WIDE = replace(WIDE, rope_theta=500.0, norm_eps=1e-3)  # not tied
PADDED = replace(WIDE, vocab_size=V + 64, tie_embeddings=True)
UNSUPPORTED = [  # changes of config.json, and the word that names the reason
    ({"model_type": "qwen2"}, "model_type='qwen2'"),
    ({"model_type": "mistral", "sliding_window": 4096}, "own-loop.md"),
    ({"model_type": "mistral"}, "model_type='mistral'"),  # its default is a window, too
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"intermediate_size": 23}, "down_proj"),
    ({"num_hidden_layers": 3}, "layers.2"),
    ({"num_hidden_layers": 1}, "layers.1"),
    ({"vocab_size": V - 1}, f"{V} ids"),
]


def exported(model: GPT, to: Path) -> Path:
    export.export(Trained(model, load_tokenizer("shipped"), "shipped"), to)
    return to


def imported(folder: Path) -> GPT:
    to = folder.with_name(f"{folder.name}-imported")
    shutil.rmtree(to, ignore_errors=True)
    assert import_hf.main([str(folder), f"--to={to}"]) == 0
    return GPT.from_checkpoint(to)


@pytest.fixture
def folder(tmp_path) -> Path:
    return exported(large(GPT(BASE)), tmp_path / "hf")


def change_json(path: Path, **change) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))


@torch.no_grad()
def assert_same_logits(model: GPT, theirs) -> None:
    x = torch.randint(0, V, (2, 32))
    logits = theirs.float()(x).logits
    torch.testing.assert_close(model(x), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [WIDE, PADDED], ids=["not tied", "padded"])
def test_out_and_in_again_with_the_same_logits_and_no_padding(shape, tmp_path):
    model = large(GPT(shape))
    folder = exported(model, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs) is transformers.LlamaForCausalLM
    assert_same_logits(model, theirs)
    again = imported(folder)
    assert again.config == shape
    assert_same_logits(again, theirs)
    theirs.get_output_embeddings().weight.data.zero_()  # all tokens are equally likely
    start = torch.zeros(8, 1, dtype=torch.long)
    tokens = theirs.generate(start, max_new_tokens=30, do_sample=True)
    assert V // 2 < tokens.max() < V


def test_16_bits_shards_a_mistral_and_both_spellings_of_theta_are_read(folder):
    load = transformers.LlamaForCausalLM.from_pretrained
    shards = shutil.copytree(folder, folder.with_name("shards"))
    (shards / "model.safetensors").unlink()
    load(folder).bfloat16().save_pretrained(shards, max_shard_size="20KB")
    assert_same_logits(imported(shards), load(shards))
    path = folder / "config.json"
    change_json(path, model_type="mistral", sliding_window=None)
    assert imported(folder).config == BASE
    rope = {"rope_type": "default", "rope_theta": 500.0}
    change_json(path, rope_theta=None, rope_parameters=rope)  # transformers 5
    change_json(path, max_position_embeddings=10**9)
    model = imported(folder)
    assert model.config.rope_theta == 500
    assert model.cos.nbytes < 10e6
    change_json(path, rope_theta=500.0, rope_parameters=None)  # transformers 4
    assert imported(folder).config.rope_theta == 500


@pytest.mark.parametrize("change, word", UNSUPPORTED, ids=str)
def test_what_is_not_supported_is_refused_by_name(change, word, folder, refused):
    change_json(folder / "config.json", **change)
    to = folder.with_name("new")
    refused(word, folder, f"--to={to}", main=import_hf.main)
    assert not to.exists()


def test_weights_that_contradict_config_json_are_refused(folder, refused):
    file = folder / "model.safetensors"
    to = f"--to={folder.with_name('new')}"
    head = "lm_head.weight"
    weights = safetensors.load_file(file)
    weights[head] = weights["model.embed_tokens.weight"].clone()
    safetensors.save_file(weights, file, {"format": "pt"})
    imported(folder)  # the tied head, written out
    weights[head] += 1
    safetensors.save_file(weights, file, {"format": "pt"})
    refused(head, folder, to, main=import_hf.main)
    file.write_bytes(file.read_bytes()[:-100])
    refused("damaged", folder, to, main=import_hf.main)


def test_an_exported_tokenizer_gives_the_same_ids(folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    cut = {"max_length": 3, "strategy": "LongestFirst"}
    cut |= {"stride": 0, "direction": "Right"}
    change_json(folder / "tokenizer.json", truncation=cut)  # which training must not do
    ours = load_tokenizer("shipped")
    again = load_tokenizer(str(folder))
    texts = ["", "   two  spaces\n\n\n\tand\r\nline ends ", f"a {END_OF_TEXT} b"]
    texts += [
        "I'LL don't 'S x1² 1234567" + "a" * 99,
        "😀👩‍👩‍👧 ünï\u0301 漢字 \u2028\ufeff",
    ]
    draw = random.Random(0)
    for end in [0x80, 0x300, 0xD800] * 100:
        texts.append("".join(chr(draw.randrange(end)) for _ in range(40)))
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    for text in texts:
        ids = theirs(text, **plain)["input_ids"]
        assert ids == ours.encode_ordinary(text) == again.encode_ordinary(text), text
        assert theirs.decode(ids) == text
        assert b"".join(map(again.decode_single_token_bytes, ids)).decode() == text
    assert theirs(END_OF_TEXT)["input_ids"] == [V - 1]
    assert theirs.eos_token_id == again.eot_token == V - 1


def test_a_folder_is_imported_pruned_exported_and_sampled(
    toy, tmp_path, capsys, refused
):
    folder = exported(GPT(PADDED), tmp_path / "hf")
    special = {"eos_token": "!", "bos_token": "?", "pad_token": None}
    change_json(folder / "tokenizer_config.json", **special)
    imported(folder)
    start = tmp_path / "hf-imported"
    own, out, back = tmp_path / "own", tmp_path / "pruned", tmp_path / "back"
    prepare([toy.parent / "text.jsonl"], str(folder), own)
    knobs = [f"--init_from={start}", f"--data_dir={own}", "--n_kv_head_target=0"]
    knobs += ["--d_model_target=24", "--round_vocab_to=68"]
    refused("tools.import_hf", toy, f"--out_dir={out}", f"--init_from={folder}")
    refused("not empty", folder, f"--to={start}", main=import_hf.main)
    assert run(toy, out, *knobs, "--stop_after=20") == 0
    refused("its prune window", out, f"--to={back}", main=export.main)
    shutil.rmtree(folder)  # the run has its weights, and the data their tokenizer
    assert train(out, "--resume") == 0
    shape = load_checkpoint(out)["model_config"]
    assert shape == replace(PADDED, context_length=16, d_model=24, n_layer=2, d_ff=8)
    assert export.main([str(out), f"--to={back}"]) == 0
    imported(back)
    capsys.readouterr()
    for model in (out, tmp_path / "back-imported"):
        assert sample.main([str(model), "--prompt=The sum", "--tokens=5"]) == 0
    texts = capsys.readouterr().out
    assert texts.startswith("The sum")
    assert texts == 2 * texts[: len(texts) // 2]
    theirs = transformers.AutoTokenizer.from_pretrained(back)
    ids = json.loads((back / "generation_config.json").read_bytes())
    ends = theirs.convert_tokens_to_ids(["!", END_OF_TEXT])
    assert ids["eos_token_id"] == ends  # END_OF_TEXT is what the data has


def test_an_export_is_whole_or_not_there(undisturbed, tmp_path, refused, monkeypatch):
    full = Mock(side_effect=OSError("No space left"))
    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", full)
    refused("No space left", undisturbed, f"--to={tmp_path / 'hf'}", main=export.main)
    assert not list(tmp_path.iterdir())
    refused("exists", undisturbed, f"--to={tmp_path}", main=export.main)
