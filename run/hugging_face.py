"""Our model as a Hugging Face folder of a LlamaForCausalLM, in and out. It computes the same; only
names change. The package transformers reads and writes the files: safetensors, and never code."""

import json
from dataclasses import replace
from pathlib import Path
from textwrap import shorten

import torch

from data.command import UserError
from model import GPTConfig

# Ours -> theirs. Half-split rotary embeddings on both sides, so q and k keep their rows.
NAMES = {"embed": "model.embed_tokens", "norm": "model.norm", "unembed": "lm_head"}
BLOCK_NAMES = {
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj", "attention.o": "self_attn.o_proj",
    "ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj", "ffn.down": "mlp.down_proj",
}  # fmt: skip

# Sizes: ours -> the key of config.json. `n_head` is no field of GPTConfig, but follows from them.
SIZES = {
    "vocab_size": "vocab_size", "context_length": "max_position_embeddings",
    "n_layer": "num_hidden_layers", "d_model": "hidden_size", "d_ff": "intermediate_size",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "head_dim": "head_dim",
    "tie_embeddings": "tie_word_embeddings", "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps",
}  # fmt: skip
# Keys that would change the computation, and the value that does not.
SUPPORTED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False}
SUPPORTED |= {"mlp_bias": False, "quantization_config": None}


def weight_names(shape: GPTConfig) -> dict[str, str]:
    """Our name -> theirs, of every weight."""
    names = dict(NAMES)
    for i in range(shape.n_layer):
        names |= {f"blocks.{i}.{a}": f"model.layers.{i}.{b}" for a, b in BLOCK_NAMES.items()}
    return {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in names.items()}


def need_transformers():
    """The package, told to say nothing."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def llama_config(shape: GPTConfig):
    config = need_transformers().LlamaConfig(**{b: getattr(shape, a) for a, b in SIZES.items()})
    config.rope_theta = shape.rope_theta  # 5 writes it elsewhere only, where 4 does not look
    return config


def load_folder(folder: Path) -> dict:
    """`model_config` and `model` of a folder, as checkpoint.load_model takes them. Weights keep
    their type, 16 or 32 bits. Raises UserError for what is missing, damaged or not supported."""
    shape, llama = read_shape(folder), need_transformers().LlamaForCausalLM
    untied = llama_config(replace(shape, tie_embeddings=False))  # to see a head that differs
    try:
        model, found = llama.from_pretrained(
            folder, config=untied, dtype="auto", local_files_only=True,
            use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # of transformers, safetensors or the system
        raise UserError(f"{folder}: unreadable or damaged: {shorten(str(error), 300)}") from error
    given, names = model.state_dict(), weight_names(shape)
    head, embed = names["unembed.weight"], names["embed.weight"]
    if shape.tie_embeddings and head in found["missing_keys"]:
        found["missing_keys"].remove(head)
        given[head] = given[embed]
    elif shape.tie_embeddings and not torch.equal(given[head], given[embed]):
        raise UserError(f"{folder}: tie_word_embeddings=true, but {head} is another matrix")
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        for key in sorted(map(str, found[what])):
            raise UserError(f"{folder}: weights and config.json disagree, {what}: {key}")
    return {"model_config": shape, "model": {ours: given[names[ours]] for ours in names}}


def read_shape(folder: Path) -> GPTConfig:
    """The shape in a folder's config.json. Raises UserError: what is missing or not supported."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_bytes())
        said = {k: v for k, v in content.items() if v is not None}
        if said.get("model_type") == "mistral" and content.get("sliding_window", 4096) is None:
            said["model_type"] = "llama"  # by another name, but for the window
        ropes = [said.get(key, {}) for key in ("rope_parameters", "rope_scaling")]  # in 5, in 4
        if {rope.get(key) for rope in ropes for key in ("rope_type", "type")} - {None, "default"}:
            raise ValueError(f"{ropes} is not supported: the rotary embedding would be scaled")
        for key, value in SUPPORTED.items():
            if said.get(key, value) != value:
                raise ValueError(f"{key}={said[key]!r}, not {value!r}: see docs/own-loop.md")
        n_head = said["num_attention_heads"]
        given = {  # what a LlamaForCausalLM has where config.json says nothing, or null
            "num_key_value_heads": n_head, "head_dim": said["hidden_size"] // n_head,
            "max_position_embeddings": 2048, "tie_word_embeddings": False,
            "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
        } | said | ropes[1] | ropes[0]  # fmt: skip
        sizes = {ours: given[theirs] for ours, theirs in SIZES.items()}
        sizes["context_length"] = min(sizes["context_length"], 2**17)  # each one takes memory
        sizes["queries_per_kv"] = sizes.pop("n_head") // sizes["n_kv_head"]
        sizes |= {key: float(sizes[key]) for key in ("rope_theta", "norm_eps")}
        return GPTConfig(**sizes)
    except Exception as error:  # whatever a foreign file leads to
        raise UserError(f"{path}: {shorten(f'{type(error).__name__}: {error}', 300)}") from error
