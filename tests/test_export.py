"""Our model as a Hugging Face folder and back."""
# ruff: noqa: E402 (imports after importorskip)

import json
import os
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

from helpers import run
from test_model import SHAPES, large

from data.prepare import prepare
from data.tokenizer import END_OF_TEXT, load_tokenizer
from model import GPT
from run.checkpoint import load_checkpoint, load_model
from run.hugging_face import load_folder, read_shape
from tools import Trained, export, load_trained, sample

V = 1024  # of the shipped tokenizer
BASE = replace(SHAPES["tied"], vocab_size=V, context_length=32, d_model=32, head_dim=8)
OTHER = replace(SHAPES["wide heads"], vocab_size=V, context_length=32, d_model=48, head_dim=16)
OTHER = replace(OTHER, rope_theta=500.0, norm_eps=1e-3)
OTHERS = {"not tied": OTHER, "padded": replace(OTHER, vocab_size=V + 64, tie_embeddings=True)}
CHANGES = [  # of config.json, and the word that names the reason
    ({"model_type": "qwen2"}, "model_type='qwen2'"),
    ({"model_type": "mistral", "sliding_window": 4096}, "own-loop.md"),
    ({"model_type": "mistral"}, "model_type='mistral'"),  # its default is a window, too
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),  # beside rope_parameters
    ({"intermediate_size": 23}, "down_proj"),
    ({"num_hidden_layers": 3}, "layers.2"),
    ({"num_hidden_layers": 1}, "layers.1"),
]


def exported(model: GPT, to: Path, tokenizer: str = "shipped") -> Path:
    export.export(Trained(model, load_tokenizer("shipped"), tokenizer), to)
    return to


@pytest.fixture
def folder(tmp_path) -> Path:
    return exported(large(GPT(BASE)), tmp_path / "hf")


def change_json(path: Path, **change) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_an_export_has_the_same_logits_and_never_says_padding(config, tmp_path):
    folder = exported(model := large(GPT(config)), tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs) is transformers.LlamaForCausalLM
    x = torch.randint(0, V, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, model(x), rtol=1e-4, atol=1e-4)
        again = load_trained(folder).model.cpu()
        torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-4)
        theirs.get_output_embeddings().weight.zero_()  # any token may come, but for padding
    tokens = theirs.generate(torch.zeros(8, 1, dtype=torch.long), max_new_tokens=30, do_sample=True)
    assert V // 2 < tokens.max() < V


def test_an_exported_tokenizer_gives_the_same_ids(folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    cut = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    change_json(folder / "tokenizer.json", truncation=cut)  # which training must not do
    ours, again = load_tokenizer("shipped"), load_tokenizer(str(folder))
    texts = ["", "   two  spaces\n\n\n\tand\r\nline ends ", f"before {END_OF_TEXT} after"]
    texts += ["I'LL don't 'S x1² 1234567" + "a" * 99, "😀👩‍👩‍👧 ünï\u0301 漢字 \u2028\u0085\ufeff"]
    draw = random.Random(0)
    for end in [0x80, 0x300, 0xD800] * 100:
        texts.append("".join(chr(draw.randrange(end)) for _ in range(40)))
    for text in texts:
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == ours.encode_ordinary(text) == again.encode_ordinary(text), text
        assert theirs.decode(ids) == text
        assert b"".join(map(again.decode_single_token_bytes, ids)).decode() == text
    assert theirs(END_OF_TEXT)["input_ids"] == [V - 1]  # the default there: special
    assert (theirs.eos_token_id, again.n_vocab, again.eot_token) == (V - 1, V, V - 1)


def same_logits(folder: Path, theirs) -> None:
    model, x = load_model(load_folder(folder), torch.device("cpu")), torch.randint(0, V, (1, 32))
    torch.testing.assert_close(model(x), theirs.float()(x).logits, rtol=1e-4, atol=1e-4)


def test_a_llama_in_16_bits_and_a_mistral_without_a_window_are_read(folder, tmp_path):
    load = transformers.LlamaForCausalLM.from_pretrained
    (llama := load(folder)).bfloat16().save_pretrained(to := tmp_path / "16", max_shard_size="20KB")
    assert len(list(to.glob("*.safetensors"))) > 2
    same_logits(to, load(to))
    change = {"model_type": "mistral", "sliding_window": None}
    config = transformers.MistralConfig(**llama.config.to_dict() | change)
    theirs = transformers.MistralForCausalLM.from_pretrained(folder, config=config)
    theirs.save_pretrained(to := tmp_path / "mistral")
    assert change.items() <= json.loads((to / "config.json").read_bytes()).items()
    same_logits(to, theirs)


@pytest.mark.parametrize("change, word", CHANGES, ids=str)
def test_what_is_not_supported_is_refused_by_name(change, word, folder, refused):
    change_json(folder / "config.json", **change)
    refused(word, folder, main=sample.main)


def test_a_folder_that_contradicts_itself_is_refused(folder, refused):
    path, file = folder / "tokenizer.json", folder / "model.safetensors"
    weights, head = safetensors.load_file(file), "lm_head.weight"
    weights[head] = weights["model.embed_tokens.weight"].clone()
    safetensors.save_file(weights, file, {"format": "pt"})
    assert load_folder(folder)  # the tied head, written out
    safetensors.save_file(weights | {head: weights[head] + 1}, file, {"format": "pt"})
    refused(head, folder, main=sample.main)
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, folder, main=sample.main)
    added = json.loads(path.read_bytes())["added_tokens"]
    change_json(path, added_tokens=[*added, added[-1] | {"id": V, "content": "<one more>"}])
    safetensors.save_file(weights, file, {"format": "pt"})
    refused(f"{V + 1} ids", folder, main=sample.main)


def test_both_spellings_of_theta_and_any_number_of_positions_are_read(folder):
    path, rope = folder / "config.json", {"rope_type": "default", "rope_theta": 500.0}
    change_json(path, rope_theta=None, rope_parameters=rope, max_position_embeddings=10**9)
    model = load_trained(folder).model  # transformers 5
    assert model.config.rope_theta == 500 and model.cos.nbytes < 10e6
    change_json(path, rope_theta=500.0, rope_parameters=None)
    assert read_shape(folder).rope_theta == 500  # transformers 4


def test_a_folder_is_pruned_exported_and_sampled(tmp_path, toy, capsys, refused):
    folder = exported(GPT(wide := OTHERS["padded"]), tmp_path / "hf")
    change_json(folder / "tokenizer_config.json", eos_token="!", bos_token="?", pad_token=None)
    own, out, back = tmp_path / "own", tmp_path / "pruned", tmp_path / "back"
    prepare([toy.parent / "text.jsonl"], str(folder), own)
    knobs = [f"--init_from={folder}", f"--data_dir={own}", "--n_kv_head_target=0"]
    knobs += ["--d_model_target=24", "--round_vocab_to=68"]
    refused("--round_vocab_to", toy, f"--out_dir={out}", *knobs[:-1])
    assert run(toy, out, *knobs, "--stop_after=20") == 0
    refused("its prune window", out, f"--to={back}", main=export.main)
    shutil.rmtree(folder)  # the run has its weights, and the data their tokenizer
    assert run(toy, out, *knobs, "--resume") == 0
    shape = load_checkpoint(out / "checkpoint.pt")["model_config"]
    assert shape == replace(wide, context_length=16, d_model=24, n_layer=2, d_ff=8)
    assert export.main([str(out), f"--to={back}"]) == 0
    capsys.readouterr()
    prompt = os.fsdecode("--prompt=The sum ☃".encode())  # as a shell gives it, in any locale
    for model in (out, back):  # the folder itself is a run, too
        assert sample.main([str(model), prompt, "--tokens=5"]) == 0
    both = capsys.readouterr().out
    assert both == 2 * both[: len(both) // 2] and both.startswith("The sum ☃") and len(both) > 22
    theirs = transformers.AutoTokenizer.from_pretrained(back)
    ids = json.loads((back / "generation_config.json").read_bytes())
    ends = theirs.convert_tokens_to_ids(["!", END_OF_TEXT])  # of a text: as the data has it
    assert ids["eos_token_id"] == ends and theirs.eos_token_id == ends[0]


def test_tokens_of_sentencepiece_spell_spaces_and_bytes(tmp_path):
    words = [END_OF_TEXT, "\u2581caf", "<0xC3>", "<0xA9>", "é"]
    model = tokenizers.models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True)
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    pieces = map(load_tokenizer(str(tmp_path)).decode_single_token_bytes, [1, 2, 3, 4])
    assert b"".join(pieces).decode() == " caféé"


def test_an_export_is_whole_or_not_there(undisturbed, tmp_path, refused, monkeypatch):
    full = Mock(side_effect=OSError("No space left"))
    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", full)
    refused("No space left", undisturbed, f"--to={tmp_path / 'hf'}", main=export.main)
    assert not list(tmp_path.iterdir())
    refused("exists", undisturbed, f"--to={tmp_path}", main=export.main)
