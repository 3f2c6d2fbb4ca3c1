"""Our model as a Hugging Face folder of a LlamaForCausalLM, in and out: names, shape, weights.

The computation is the same (model.py), so the weights only change their names. Needs the package
safetensors where it is used, and never runs code from a folder.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model import GPT, GPTConfig
from run import UserError

# Ours -> theirs. Half-split rotary embeddings on both sides, so q and k keep their rows.
NAMES = {"embed": "model.embed_tokens", "norm": "model.norm", "unembed": "lm_head"}
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

# Keys of config.json that would change the computation, and the values that do not. A key that is
# not there has the first of them; rope scaling has its own place, in `read_shape`.
SUPPORTED = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "auto_map": (None,),  # the model's own code
}


def weight_names(shape: GPTConfig) -> dict[str, str]:
    """Our name -> theirs, of every weight in the file. Tied embeddings are in it once."""
    names = {a: b for a, b in NAMES.items() if not (a == "unembed" and shape.tie_embeddings)}
    for layer in range(shape.n_layer):
        for a, b in BLOCK_NAMES.items():
            names[f"blocks.{layer}.{a}"] = f"model.layers.{layer}.{b}"
    return {f"{a}.weight": f"{b}.weight" for a, b in names.items()}


def need_safetensors():
    """The package, in which a folder's weights lie. Raises UserError where it is missing."""
    try:
        import safetensors.torch
    except ImportError:
        way = "pip install -r requirements-hf.txt"
        raise UserError(f"Hugging Face folders need the package safetensors: {way}") from None
    return safetensors


def config_json(shape: GPTConfig, bos: int, eos: int) -> dict:
    """config.json of a shape. bos, eos: ids of the special tokens."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.d_model,
        "intermediate_size": shape.d_ff,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_kv_head,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": shape.context_length,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,  # transformers 4; the next line is for 5
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": shape.tie_embeddings,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": "float32",
    }


def load_folder(folder: Path) -> dict:
    """`model_config` and `model` of a folder, as checkpoint.load_model takes them.

    Weights are float32, bfloat16 or float16, in one file or several. They are mapped, not read:
    `load_model` copies them into a float32 model, so memory is checked before they are read.

    Raises UserError, in one line, for what is missing, damaged or not supported.
    """
    shape, safetensors = read_shape(folder), need_safetensors()
    theirs: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                theirs |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError, RuntimeError, AttributeError) as error:
            raise UserError(f"{path}: cannot be read, or is damaged: {error}") from error
    with torch.device("meta"):
        expected = GPT(replace(shape, context_length=1)).state_dict()
    weights = {}
    for ours, name in weight_names(shape).items():
        if name not in theirs:
            raise UserError(f"{folder}: its weights lack {name}")
        weight = weights[ours] = theirs.pop(name)
        if weight.shape != expected[ours].shape:
            there, here = tuple(weight.shape), tuple(expected[ours].shape)
            raise UserError(f"{folder}: {name} is {there}, by config.json {here}")
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{folder}: {name} is {weight.dtype}; only floats of 16 or 32 bits are")
    if shape.tie_embeddings:
        weights["unembed.weight"] = weights["embed.weight"]
        theirs.pop("lm_head.weight", None)  # some write it twice
    unknown = [name for name in theirs if not name.endswith("rotary_emb.inv_freq")]  # computed
    if unknown:
        raise UserError(f"{folder}: {unknown[0]} is a weight that model.py does not have")
    return {"model_config": shape, "model": weights}


def read_shape(folder: Path) -> GPTConfig:
    """The shape in a folder's config.json. Raises UserError that names what is missing or not
    supported."""
    path = folder / "config.json"
    if (folder / "checkpoint.pt").is_file():
        raise UserError(f"{folder}: is a run's folder; give {folder / 'checkpoint.pt'}")
    if not path.is_file():
        raise UserError(f"{folder}: has no config.json, so it is no Hugging Face folder")
    try:
        return shape_of(read_json(path), path)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not as transformers writes it: {error}") from error


def shape_of(config: dict, path: Path) -> GPTConfig:
    def refuse(key: str, why: str) -> None:
        raise UserError(f"{path}: {key}={config.get(key)!r} {why}")

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key) or default
        if type(value) is not int or value <= 0:
            refuse(key, "should be a whole number greater than 0")
        return value

    if config.get("model_type") != "llama":
        refuse("model_type", "is not supported, only 'llama' is")
    for key, values in SUPPORTED.items():
        if config.get(key, values[0]) not in values:
            refuse(key, f"is not supported, only {values[0]!r} is")
    theta = config.get("rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):  # of transformers 4 and 5
        rope = config.get(key) or {}
        plain = rope.get("rope_type", rope.get("type", "default")) == "default"
        if not plain or rope.get("partial_rotary_factor", 1) != 1:
            refuse(key, "is not supported: the embedding would be scaled")
        theta = rope.get("rope_theta", theta)
    n_layer, d_model = size("num_hidden_layers"), size("hidden_size")
    n_head = size("num_attention_heads")
    n_kv_head = size("num_key_value_heads", n_head)
    if n_head % n_kv_head:
        refuse("num_key_value_heads", f"should divide num_attention_heads={n_head}")
    head_dim = size("head_dim", d_model // n_head)
    if head_dim % 2:
        refuse("head_dim", "should be even")
    theta, norm_eps = float(theta), float(config.get("rms_norm_eps", 1e-6))
    if not (theta > 0 and norm_eps > 0):
        raise ValueError(f"rope theta {theta} and rms_norm_eps {norm_eps} should be above 0")
    return GPTConfig(
        vocab_size=size("vocab_size"),
        context_length=size("max_position_embeddings", 2048),
        n_layer=n_layer,
        d_model=d_model,
        head_dim=head_dim,
        queries_per_kv=n_head // n_kv_head,
        n_kv_head=n_kv_head,
        d_ff=size("intermediate_size"),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope_theta=theta,
        norm_eps=norm_eps,
    )


def weight_files(folder: Path) -> list[Path]:
    """One file, or those that an index names."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if not (folder / "model.safetensors").is_file() and index.is_file():
        names = set(map(str, read_json(index).get("weight_map", {}).values()))
    for name in sorted(names):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: has no {name}; only safetensors are read")
    return [folder / name for name in sorted(names)]


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not an object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
