"""Our model as a GGUF file, read back with the package gguf, and by llama.cpp where it is there."""
# ruff: noqa: E402 (imports after importorskip)

import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

from helpers import ROOT, refused
from test_model import large
from tokenizers import models, pre_tokenizers

from data.tokenizer import PATTERN, FolderTokenizer, load_tokenizer
from model import GPT, GPTConfig
from run import UserError
from tools.export import export, main
from tools.load import Trained

V = 1024  # of the shipped tokenizer
SHAPE = GPTConfig(
    vocab_size=V, context_length=32, n_layer=2, d_model=48, head_dim=16, queries_per_kv=3,
    n_kv_head=2, d_ff=40, rope_theta=500.0, norm_eps=1e-3, tie_embeddings=False,
)  # fmt: skip
BOTH = {"not tied": SHAPE, "padded": replace(SHAPE, vocab_size=V + 64, tie_embeddings=True)}
BLOCK = {
    "attn_norm": "attention_norm", "attn_q": "attention.q", "attn_k": "attention.k",
    "attn_v": "attention.v", "attn_output": "attention.o", "ffn_norm": "ffn_norm",
    "ffn_gate": "ffn.gate", "ffn_up": "ffn.up", "ffn_down": "ffn.down",
}  # fmt: skip
ABOUT = {
    "block_count": 2, "context_length": 32, "embedding_length": 48, "feed_forward_length": 40,
    "head_count": 6, "head_count_kv": 2, "key_length": 16, "value_length": 16,
    "dimension_count": 16, "freq_base": 500, "layer_norm_rms_epsilon": 1e-3, "vocab_size": V,
}  # fmt: skip


@pytest.fixture(scope="module", params=BOTH.values(), ids=BOTH)
def written(request, tmp_path_factory) -> tuple[Path, GPT]:
    path, model = tmp_path_factory.mktemp("gguf") / "a.gguf", large(GPT(request.param))
    export(Trained(model, load_tokenizer("shipped"), "shipped", V, V - 1, {}), path)
    return path, model


def read(path: Path) -> tuple[dict, dict]:
    """What it says, by the last word of each key, and its tensors."""
    reader = gguf.GGUFReader(path)
    about = {key.split(".")[-1]: field.contents() for key, field in reader.fields.items()}
    return about, {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}


def test_a_file_has_every_weight_and_no_padding(written):
    (about, tensors), weights = read(written[0]), written[1].state_dict()
    assert {key: about[key] for key in ABOUT} == pytest.approx(ABOUT)
    names = {"token_embd": "embed", "output_norm": "norm"}
    names |= {f"blk.{i}.{a}": f"blocks.{i}.{b}" for i in range(2) for a, b in BLOCK.items()}
    names |= {} if written[1].config.tie_embeddings else {"output": "unembed"}
    assert tensors.keys() == {f"{name}.weight" for name in names}
    for theirs, ours in names.items():
        weight, found = weights[f"{ours}.weight"], tensors[f"{theirs}.weight"]
        if ours.endswith((".q", ".k")):  # what is rotated together is 8 apart in our heads
            heads, pairs = range(0, len(weight), 16), range(8)
            weight = weight[[h + i + half for h in heads for i in pairs for half in (0, 8)]]
        assert torch.equal(found, weight[:V] if "embed" in ours else weight), ours


def test_vocabulary_and_merges_give_the_ids_that_llama_cpp_gave(written):
    about, end = read(written[0])[0], V - 1
    assert (about["model"], about["pre"], about["add_bos_token"]) == ("gpt2", "llama-bpe", False)
    assert (about["bos_token_id"], about["eos_token_id"]) == (end, end)
    assert about["token_type"] == [gguf.TokenType.NORMAL] * end + [gguf.TokenType.CONTROL]
    vocab = {token: i for i, token in enumerate(about["tokens"])}
    assert (len(vocab), vocab["<|endoftext|>"]) == (V, end)
    merges = [tuple(merge.split(" ")) for merge in about["merges"]]
    again = tokenizers.Tokenizer(models.BPE(vocab, merges))
    cuts = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    again.pre_tokenizer = pre_tokenizers.Sequence([cuts, spell])
    for line in (ROOT / "studies/gguf/measured.jsonl").read_text().splitlines():
        for text, ids in json.loads(line)["ids"]:
            ours = load_tokenizer("shipped").encode_ordinary(text)
            assert again.encode(text).ids == ids == ours


def test_llama_cpp_gives_our_ids_and_logits(written):
    llama_cpp, (path, model) = pytest.importorskip("llama_cpp"), written
    exact = {"type_k": 0, "type_v": 0}  # keys and values in float32
    llama = llama_cpp.Llama(str(path), n_ctx=0, logits_all=True, verbose=False, **exact)
    ids = llama.tokenize(text := b"Fellow citizens,\n\n  we've 1234567 <|endoftext|> reasons")
    assert ids == load_tokenizer("shipped").encode_ordinary(text.decode())
    llama.eval(ids[:32])
    ours = model(torch.tensor([ids[:32]]))[0, :, :V].detach()
    torch.testing.assert_close(torch.tensor(llama.scores[:32]), ours, rtol=1e-4, atol=1e-3)


def test_a_file_is_whole_or_not_there(undisturbed, tmp_path, capsys, monkeypatch):
    to, foreign = tmp_path / "run.gguf", Mock(spec=FolderTokenizer)
    with pytest.raises(UserError, match=r"Hugging Face tokenizer.*convert_hf_to_gguf\.py"):
        export(Trained(GPT(SHAPE), foreign, "a folder", V, V - 1, {}), to)
    with monkeypatch.context() as patched:
        full = Mock(side_effect=OSError("No space left"))
        patched.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
        refused(capsys, main, undisturbed, f"--to={to}", words="run.gguf: cannot.*: No space left")
        patched.setitem(sys.modules, "gguf", None)
        refused(capsys, main, undisturbed, f"--to={to}", words="run.gguf: .*pip install -r")
    assert not list(tmp_path.iterdir())
    assert main([str(undisturbed), f"--to={to}"]) == 0 and read(to)[1]


def test_gpt2_has_its_own_cut(tmp_path):
    gpt2 = Trained(GPT(SHAPE), load_tokenizer("shipped"), "gpt2", V, V - 1, {})
    export(gpt2, tmp_path / "a.gguf")
    assert read(tmp_path / "a.gguf")[0]["pre"] == "gpt-2"
