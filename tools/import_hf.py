"""A Hugging Face folder as a checkpoint: python -m tools.import_hf FOLDER --to NEW

FOLDER holds a Llama: config.json, safetensors and tokenizer.json. NEW/checkpoint.pt
computes the same, because only the names of its weights differ. train.py takes NEW as
--init_from and --teacher, and so do the tools. The tokenizer stays in FOLDER.
"""

import json
from argparse import ArgumentParser
from dataclasses import asdict, replace
from pathlib import Path
from textwrap import shorten

import torch
from torch import Tensor

from data.command import UserError, command, write_whole
from data.tokenizer import load_tokenizer, tokenizer_digest
from model import GPTConfig
from tools import expanded

# Our modules -> theirs. Both pair channel i of a head with channel i + head_dim / 2 in
# their rotary embeddings, so the rows of q and k keep their order.
NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "unembed": "lm_head",
}
BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}

# Attributes of GPTConfig -> keys of their config.json
SIZES = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "tie_embeddings": "tie_word_embeddings",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
}
# What a Llama has if its config.json does not say
DEFAULTS = {
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
}
# Another value of these keys would change the computation.
SUPPORTED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}
LONGEST_CONTEXT = 2**17  # each position takes memory, in `cos` and `sin` of the model


def weight_names(shape: GPTConfig) -> dict[str, str]:
    """Our name -> theirs, for every weight."""
    names = dict(NAMES)
    for i in range(shape.n_layer):
        for ours, theirs in BLOCK_NAMES.items():
            names[f"blocks.{i}.{ours}"] = f"model.layers.{i}.{theirs}"
    return {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in names.items()}


def need_transformers():
    """The package transformers, told to print nothing."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def llama_config(shape: GPTConfig):
    """The LlamaConfig of a shape."""
    sizes = {theirs: getattr(shape, ours) for ours, theirs in SIZES.items()}
    config = need_transformers().LlamaConfig(**sizes)
    # transformers 5 moved this key. Set it where version 4 looks, too.
    config.rope_theta = shape.rope_theta
    return config


def read_shape(folder: Path) -> GPTConfig:
    """The shape in a folder's config.json.

    Raises UserError if a size is missing, or if our model cannot compute the same.
    """
    path = folder / "config.json"
    try:
        settings = read_settings(path)
        sizes = {ours: settings[theirs] for ours, theirs in SIZES.items()}
        sizes["context_length"] = min(sizes["context_length"], LONGEST_CONTEXT)
        sizes["queries_per_kv"] = sizes.pop("n_head") // sizes["n_kv_head"]
        sizes["rope_theta"] = float(sizes["rope_theta"])
        sizes["norm_eps"] = float(sizes["norm_eps"])
        return GPTConfig(**sizes)
    except Exception as error:  # a foreign file may lead to any
        reason = shorten(f"{type(error).__name__}: {error}", 300)
        raise UserError(f"{path}: {reason}") from error


def read_settings(path: Path) -> dict:
    """The keys of a config.json, with a Llama's defaults for keys that it lacks.

    Raises ValueError if a key has a value that we do not support.
    """
    content = json.loads(path.read_bytes())
    settings = {key: value for key, value in content.items() if value is not None}
    has_window = content.get("sliding_window", 4096) is not None  # Mistral's default
    if settings.get("model_type") == "mistral" and not has_window:
        settings["model_type"] = "llama"  # without a window, a Mistral is a Llama
    for key, supported in SUPPORTED.items():
        value = settings.get(key, supported)
        if value != supported:
            raise ValueError(
                f"{key}={value!r}, not {supported!r}: see docs/own-loop.md"
            )
    # transformers 4 wrote rope_scaling, and 5 writes rope_parameters.
    for key in ("rope_scaling", "rope_parameters"):
        rope = settings.get(key, {})
        types = {rope.get("rope_type"), rope.get("type")}
        if types - {None, "default"}:
            problem = "is not supported: it would scale the rotary embedding"
            raise ValueError(f"{key}={rope} {problem}")
        settings |= rope
    n_head = settings["num_attention_heads"]
    settings.setdefault("num_key_value_heads", n_head)
    settings.setdefault("head_dim", settings["hidden_size"] // n_head)
    return DEFAULTS | settings


def load_weights(folder: Path, shape: GPTConfig) -> dict[str, Tensor]:
    """Our name -> weight, in 16 or 32 bits as in the files.

    Raises UserError if the files are damaged, or if weights are missing, left over or
    of another shape.
    """
    transformers = need_transformers()
    # Not tied, because the files may hold a head that differs from the embedding.
    untied = replace(shape, tie_embeddings=False)
    try:
        llama, report = transformers.LlamaForCausalLM.from_pretrained(
            folder,
            config=llama_config(untied),
            dtype="auto",
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # of transformers, safetensors or the system
        reason = shorten(str(error), 300)
        raise UserError(f"{folder}: unreadable or damaged: {reason}") from error
    weights = llama.state_dict()
    names = weight_names(shape)
    if shape.tie_embeddings:
        head = names["unembed.weight"]
        embedding = weights[names["embed.weight"]]
        is_missing = head in report["missing_keys"]
        if not is_missing and not torch.equal(weights[head], embedding):
            problem = f"tie_word_embeddings=true, but {head} is another matrix"
            raise UserError(f"{folder}: {problem}")
        report["missing_keys"] = set(report["missing_keys"]) - {head}
        weights[head] = embedding
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        for key in sorted(map(str, report[problem])):
            disagreement = f"weights and config.json disagree, {problem}: {key}"
            raise UserError(f"{folder}: {disagreement}")
    return {ours: weights[theirs] for ours, theirs in names.items()}


def read_folder(folder: Path) -> dict:
    """A checkpoint, as model.load_checkpoint reads it, of a Hugging Face folder.

    It is no run that --resume could continue: it has no config and no data. Raises
    UserError.
    """
    shape = read_shape(folder)
    tokenizer = str(folder.absolute())
    n_vocab = load_tokenizer(tokenizer).n_vocab
    if n_vocab > shape.vocab_size:
        problem = f"its tokenizer has {n_vocab} ids, its model {shape.vocab_size}"
        raise UserError(f"{folder}: {problem}")
    return {
        "step": 0,
        "flops": 0,
        "model_config": asdict(shape),
        "data": "",
        "tokenizer": tokenizer,
        "tokenizer_digest": tokenizer_digest(tokenizer),
        "model": load_weights(folder, shape),
    }


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=expanded, help="a Hugging Face folder")
    parser.add_argument("--to", type=expanded, required=True, help="the folder to make")
    args = parser.parse_args(argv)
    if args.to.exists() and any(args.to.iterdir()):
        raise UserError(f"{args.to}: is not empty; give another --to")
    checkpoint = read_folder(args.folder)
    args.to.mkdir(parents=True, exist_ok=True)
    path = args.to / "checkpoint.pt"
    write_whole(path, lambda file: torch.save(checkpoint, file))
    n_params = GPTConfig(**checkpoint["model_config"]).n_params()
    print(f"{args.to}: a Llama of {n_params:,} parameters")


if __name__ == "__main__":
    raise SystemExit(main())
