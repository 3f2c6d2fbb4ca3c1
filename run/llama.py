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
from run.checkpoint import CheckpointError

# Ours -> theirs. Half-split rotary embeddings on both sides, so q and k keep their rows.
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


def weight_shapes(shape: GPTConfig) -> dict[str, torch.Size]:
    """Our name -> shape of every weight, without making any."""
    with torch.device("meta"):
        model = GPT(replace(shape, context_length=1))
    return {name: w.shape for name, w in model.state_dict().items()}


# --------------------------------------------------------------------------------------------------
# Out
# --------------------------------------------------------------------------------------------------


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def config_json(shape: GPTConfig, bos: int, eos: int) -> dict:
    """config.json of a shape with equally wide layers. bos, eos: ids of the special tokens."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.d_model,
        "intermediate_size": shape.d_ff[0],
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_kv_head[0] * shape.queries_per_kv,
        "num_key_value_heads": shape.n_kv_head[0],
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


def save_weights(folder: Path, shape: GPTConfig, weights: dict[str, Tensor]) -> None:
    """model.safetensors from weights under our names. Raises CheckpointError without safetensors,
    OSError where the file cannot be written."""
    _need_safetensors(folder)
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path, names = folder / "model.safetensors", weight_names(shape)
    tensors = {theirs: weights[ours].float().contiguous() for ours, theirs in names.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"{path.name}: {error}") from error


# --------------------------------------------------------------------------------------------------
# In
# --------------------------------------------------------------------------------------------------


def load_folder(folder: Path) -> dict:
    """`model_config` and `model` of a folder, as checkpoint.load_model takes them.

    Weights are float32, bfloat16 or float16, in one file or several. They are mapped, not read:
    `load_model` copies them into a float32 model, and before it the shape can be judged.

    Raises CheckpointError, in one line, for what is missing, damaged or not supported.
    """
    shape = read_shape(folder)
    files = _weight_files(folder)
    _need_safetensors(folder)
    from safetensors import SafetensorError, safe_open

    theirs: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                theirs |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"{path}: cannot be read, or is damaged: {error}") from error
    weights, shapes = {}, weight_shapes(shape)
    for ours, name in weight_names(shape).items():
        if name not in theirs:
            raise CheckpointError(f"{folder}: its weights lack {name}")
        weights[ours] = theirs.pop(name)
        if weights[ours].shape != shapes[ours]:
            there, here = tuple(weights[ours].shape), tuple(shapes[ours])
            raise CheckpointError(f"{folder}: {name} is {there}, by config.json {here}")
        if weights[ours].dtype not in (torch.float32, torch.bfloat16, torch.float16):
            dtype = str(weights[ours].dtype).removeprefix("torch.")
            raise CheckpointError(f"{folder}: {name} is {dtype}; only floats of 16 or 32 bits are")
    if shape.tie_embeddings:
        weights["unembed.weight"] = weights["embed.weight"]
        theirs.pop("lm_head.weight", None)  # some write it twice
    unknown = [name for name in theirs if not name.endswith("rotary_emb.inv_freq")]  # computed
    if unknown:
        raise CheckpointError(f"{folder}: {unknown[0]} is a weight that model.py does not have")
    return {"model_config": shape, "model": weights}


def read_shape(folder: Path) -> GPTConfig:
    """The shape in a folder's config.json. Raises CheckpointError that names what is missing or not
    supported."""
    path = folder / "config.json"
    if (folder / "checkpoint.pt").is_file():
        raise CheckpointError(f"{folder}: is a run's folder; give {folder / 'checkpoint.pt'}")
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no config.json, so it is no Hugging Face folder")
    config = _read_json(path)

    def refuse(key: str, value: object, why: str = "is not supported") -> None:
        raise CheckpointError(f"{path}: {key}={value!r} {why}")

    if config.get("model_type") != "llama":
        refuse("model_type", config.get("model_type"), "is not supported, only 'llama' is")
    for key, values in SUPPORTED.items():
        if config.get(key, values[0]) not in values:
            refuse(key, config[key], f"is not supported, only {values[0]!r} is")
    theta = config.get("rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):  # of transformers 4 and 5
        rope = config.get(key) or {}
        if not isinstance(rope, dict):
            refuse(key, rope)
        plain = rope.get("rope_type", rope.get("type", "default")) == "default"
        if not plain or rope.get("partial_rotary_factor", 1) != 1:
            refuse(key, rope, "is not supported: the embedding would be scaled")
        theta = rope.get("rope_theta", theta)

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key) or default
        if type(value) is not int or value <= 0:
            refuse(key, config.get(key), "should be a whole number greater than 0")
        return value

    def number(key: str, value: object) -> float:
        if type(value) not in (int, float) or not value > 0:
            refuse(key, value, "should be a number greater than 0")
        return float(value)

    n_layer, d_model = size("num_hidden_layers"), size("hidden_size")
    n_head = size("num_attention_heads")
    n_kv_head = size("num_key_value_heads", n_head)
    if n_head % n_kv_head:
        refuse("num_key_value_heads", n_kv_head, f"should divide num_attention_heads={n_head}")
    head_dim = size("head_dim", d_model // n_head)
    if head_dim % 2:
        refuse("head_dim", head_dim, "should be even")
    return GPTConfig(
        vocab_size=size("vocab_size"),
        context_length=size("max_position_embeddings", 2048),
        d_model=d_model,
        head_dim=head_dim,
        queries_per_kv=n_head // n_kv_head,
        n_kv_head=[n_kv_head] * n_layer,
        d_ff=[size("intermediate_size")] * n_layer,
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope_theta=number("rope_theta", theta),
        norm_eps=number("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
    )


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if not (folder / "model.safetensors").is_file() and index.is_file():
        shards = _read_json(index).get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) else {None}
        if not all(isinstance(n, str) and n == Path(n).name for n in names):
            raise CheckpointError(f"{index}: its weight_map should name files beside it")
    for name in sorted(names):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: has no {name}; only safetensors are read")
    return [folder / name for name in sorted(names)]


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    return content


def _need_safetensors(folder: Path) -> None:
    try:
        import safetensors  # noqa: F401
    except ImportError:
        way = "pip install -r requirements-hf.txt"
        raise CheckpointError(f"{folder}: needs the package safetensors: {way}") from None
