"""Our model as a Hugging Face folder, and a folder as our model."""
# ruff: noqa: E402 (imports after importorskip)

import errno
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from helpers import events, refused, run
from test_model import large

import train
from data.prepare import prepare
from data.tokenizer import END_OF_TEXT, load_tokenizer
from model import GPT, GPTConfig
from run.checkpoint import load_checkpoint, load_model
from run.hugging_face import load_folder, read_shape
from tools import export, sample
from tools.load import Trained, load_trained

V = 1024  # of the shipped tokenizer
BASE = GPTConfig(
    vocab_size=V, context_length=32, n_layer=2, d_model=32, head_dim=8, queries_per_kv=2,
    n_kv_head=2, d_ff=24,
)  # fmt: skip
SHAPES = {
    "padded vocabulary": replace(BASE, vocab_size=V + 64, rope_theta=500.0, norm_eps=0.1),
    "not tied, narrow": replace(BASE, d_model=16, d_ff=40, tie_embeddings=False),
}


def exported(model: GPT, to: Path) -> Path:
    export.export(Trained(model, load_tokenizer("shipped"), "shipped", V, V - 1, {}), to)
    return to


@pytest.fixture
def folder(tmp_path) -> Path:
    return exported(large(GPT(BASE)), tmp_path / "hf")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_export_has_the_same_logits_and_never_says_padding(shape, tmp_path):
    model = large(GPT(shape))
    folder = exported(model, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs) is transformers.LlamaForCausalLM
    x = torch.randint(0, V, (2, shape.context_length))
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, model(x), rtol=1e-4, atol=1e-4)
        again = load_trained(folder).model.cpu()
        torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-4)
        # All logits are equal: any token may come, but for those that only pad
        theirs.get_output_embeddings().weight.zero_()
    tokens = theirs.generate(torch.zeros(8, 1, dtype=torch.long), max_new_tokens=30, do_sample=True)
    assert V // 2 < tokens.max() < V


def test_an_export_that_fails_leaves_nothing(undisturbed, tmp_path, capsys, monkeypatch):
    to, arguments = tmp_path / "folder", (undisturbed, f"--to={tmp_path / 'folder'}")
    with monkeypatch.context() as patched:
        full = OSError(errno.ENOSPC, "No space left on device")
        patched.setattr(Path, "write_text", Mock(side_effect=full))
        refused(capsys, export.main, *arguments, words=f"{to}: cannot be written: .*space")
    assert not list(tmp_path.iterdir())
    assert export.main(list(map(str, arguments))) == 0
    refused(capsys, export.main, *arguments, words=f"{to}: exists")


def test_an_exported_tokenizer_gives_the_same_ids(folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    cut = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    change_json(folder / "tokenizer.json", truncation=cut)  # which training must not do
    ours, again = load_tokenizer("shipped"), load_tokenizer(str(folder))
    texts = ["", "   two  spaces\n\n\n\tand\r\nline ends ", f"before {END_OF_TEXT} after"]
    texts += ["I'LL don't 'S x1² 1234567" + "a" * 99, "😀👩‍👩‍👧 ünï\u0301 漢字 \u2028\u0085\ufeff"]
    draw = random.Random(0)
    for _ in range(300):
        end = draw.choice([0x80, 0x300, 0xD800])
        texts.append("".join(chr(draw.randrange(end)) for _ in range(40)))
    for text in texts:
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == ours.encode_ordinary(text) == again.encode_ordinary(text), text
        assert theirs.decode(ids) == text
        assert b"".join(map(again.decode_single_token_bytes, ids)).decode() == text
    assert theirs(END_OF_TEXT)["input_ids"] == [V - 1]  # the default there: special
    assert (theirs.eos_token_id, again.n_vocab, again.eot_token) == (V - 1, V, V - 1)


def test_shards_in_16_bits_that_transformers_wrote_are_read(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=48, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, head_dim=16, rms_norm_eps=1e-3,
        max_position_embeddings=64, tie_word_embeddings=False, rope_theta=500.0,
    )  # fmt: skip
    theirs = large(transformers.LlamaForCausalLM(config))
    theirs.bfloat16().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model, x = load_model(load_folder(tmp_path)), torch.randint(0, 128, (1, 64))
    with torch.no_grad():
        again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).float()
        torch.testing.assert_close(model(x), again(x).logits, rtol=1e-4, atol=1e-4)


def change_json(path: Path, **change) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


REFUSED = [
    ({"model_type": "qwen2"}, "model_type='qwen2'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ({"intermediate_size": 23}, "mismatched.*down_proj"),
    ({"num_hidden_layers": 3}, "missing.*layers.2"),
    ({"num_hidden_layers": 1}, "unexpected.*layers.1"),
    ({"num_hidden_layers": 10**9}, "no model has these sizes"),  # nor is it built first
]


@pytest.mark.parametrize("change, words", REFUSED, ids=str)
def test_what_is_not_supported_is_refused_by_name(change, words, folder, capsys):
    change_json(folder / "config.json", **change)
    refused(capsys, sample.main, folder, words=f"{folder}.*{words}")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(folder, capsys):
    path = folder / "tokenizer.json"
    added = json.loads(path.read_bytes())["added_tokens"]
    change_json(path, added_tokens=[*added, added[-1] | {"id": V, "content": "<one more>"}])
    refused(capsys, sample.main, folder, words=f"{folder}: .* {V + 1} ids, its model knows {V}")


def test_damaged_weights_are_refused(folder, capsys):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(capsys, sample.main, folder, words=f"{folder}.*damaged")


def test_both_spellings_of_theta_and_any_number_of_positions_are_read(folder):
    path, rope = folder / "config.json", {"rope_type": "default", "rope_theta": 500.0}
    change_json(path, rope_theta=None, rope_parameters=rope, max_position_embeddings=10**9)
    model = load_trained(folder).model  # transformers 5
    assert model.config.rope_theta == 500 and model.cos.nbytes < 10e6
    change_json(path, rope_theta=500.0, rope_parameters=None)
    assert read_shape(folder).rope_theta == 500  # transformers 4


def test_a_folder_is_pruned_exported_and_sampled(folder, tmp_path, toy, capsys):
    """With its own tokenizer, at every step."""
    change_json(folder / "tokenizer_config.json", eos_token="!", bos_token="?", pad_token=None)
    own, out, back = tmp_path / "own", tmp_path / "pruned", tmp_path / "back"
    prepare([toy.parent / "text.jsonl"], str(folder), own)
    knobs = [f"--init_from={folder}", f"--data_dir={own}", "--n_kv_head_target=0"]
    assert run(toy, out, *knobs, "--stop_after=20") == 0
    shutil.rmtree(folder)  # the run has its weights, and the data their tokenizer
    assert run(toy, out, *knobs, "--resume") == 0
    assert [events(out, "step")[i]["d_ff"] for i in (0, -1)] == [24, 8]
    assert export.main([str(out), f"--to={back}"]) == 0
    capsys.readouterr()
    for model in (out, back):  # the folder itself is a run, too
        assert sample.main([str(model), "--prompt=The sum ☃", "--tokens=5"]) == 0
    both = capsys.readouterr().out
    assert both == 2 * both[: len(both) // 2] and both.startswith("The sum ☃") and len(both) > 22
    theirs = transformers.AutoTokenizer.from_pretrained(back)
    ids = json.loads((back / "generation_config.json").read_bytes())
    assert ids["eos_token_id"] == theirs.eos_token_id == theirs.convert_tokens_to_ids("!")


def test_shape_theta_and_eps_of_a_folder_stay_with_the_run(tmp_path, toy, capsys):
    wide = replace(SHAPES["padded vocabulary"], d_ff=64)  # TOY: 32
    folder, out = exported(large(GPT(wide)), tmp_path / "hf"), tmp_path / "out"
    knobs = [f"--init_from={folder}", "--n_kv_head_target=0", "--d_ff_target=48"]
    words = "1088.*1024.*--round_vocab_to"
    refused(capsys, train.main, toy, f"--out_dir={out}", *knobs, words=words)
    assert not (out / "config.json").exists()
    few = ["--stop_after=1", "--learning_rate=1e-9", "--warmup_steps=0", "--round_vocab_to=68"]
    assert run(toy, out, *knobs, *few) == 0
    state, before = load_checkpoint(out / "checkpoint.pt"), load_folder(folder)["model"]
    assert state["model_config"] == replace(wide, context_length=16)
    torch.testing.assert_close(state["model"], before, rtol=1e-3, atol=1e-3)


def test_tokens_of_sentencepiece_spell_spaces_and_bytes(tmp_path):
    words = [END_OF_TEXT, "\u2581caf", "<0xC3>", "<0xA9>", "é"]
    model = tokenizers.models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True)
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    pieces = map(load_tokenizer(str(tmp_path)).decode_single_token_bytes, [1, 2, 3, 4])
    assert b"".join(pieces).decode() == " caféé"
