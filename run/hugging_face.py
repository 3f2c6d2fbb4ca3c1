"""Our model as a Hugging Face folder of a LlamaForCausalLM, in and out: shape, names of weights.

The computation is the same (model.py), so the weights only change their names. The package
transformers reads and writes the files: safetensors only, and never code from a folder.
"""

import json
from pathlib import Path

from torch import Tensor

from model import GPTConfig
from run import UserError
from run.cost import n_parameters

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

# Keys of config.json that would change the computation, and the value that does not: null and a
# key that is not there mean the same.
SUPPORTED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}
MAX_CONTEXT = 2**17  # a folder may name any number of positions, and each takes memory


def weight_names(shape: GPTConfig) -> dict[str, str]:
    """Our name -> theirs, of every weight."""
    names = dict(NAMES)
    for layer in range(shape.n_layer):
        for ours, theirs in BLOCK_NAMES.items():
            names[f"blocks.{layer}.{ours}"] = f"model.layers.{layer}.{theirs}"
    return {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in names.items()}


def need_transformers():
    """The package, told to say nothing: what matters comes as an error. Raises UserError where it
    is missing."""
    try:
        import transformers
    except ImportError:
        way = "pip install -r requirements-extra.txt"
        raise UserError(f"Hugging Face folders need the package transformers: {way}") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def llama_config(shape: GPTConfig):
    """The LlamaConfig of a shape."""
    config = need_transformers().LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.n_layer,
        num_attention_heads=shape.n_head,
        num_key_value_heads=shape.n_kv_head,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context_length,
        rms_norm_eps=shape.norm_eps,
        rope_theta=shape.rope_theta,
        tie_word_embeddings=shape.tie_embeddings,
    )
    config.rope_theta = shape.rope_theta  # 5 writes it elsewhere only, where 4 does not look
    return config


def to_llama(shape: GPTConfig, weights: dict[str, Tensor]):
    """The same model as a LlamaForCausalLM. weights: float32, under our names."""
    llama = need_transformers().LlamaForCausalLM(llama_config(shape))
    llama.load_state_dict({theirs: weights[ours] for ours, theirs in weight_names(shape).items()})
    return llama


def load_folder(folder: Path) -> dict:
    """`model_config` and `model` of a folder, as checkpoint.load_model takes them. Weights keep
    their type, 16 or 32 bits.

    Raises UserError, in one line, for what is missing, damaged or not supported.
    """
    shape, size = read_shape(folder), sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    if n_parameters(shape) > size:  # or a false number of layers would be built first
        what = f"{n_parameters(shape):,} parameters by config.json, {size:,} bytes of safetensors"
        raise UserError(f"{folder}: {what}")
    llama = need_transformers().LlamaForCausalLM
    try:
        model, found = llama.from_pretrained(
            folder, config=llama_config(shape), dtype="auto", local_files_only=True,
            use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # of transformers, safetensors or the system
        raise UserError(f"{folder}: cannot be read, or is damaged: {one_line(error)}") from error
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if found[what]:
            one = sorted(map(str, found[what]))[0]
            raise UserError(f"{folder}: weights and config.json disagree, {what}: {one}")
    weights = model.state_dict()
    names = weight_names(shape)
    return {"model_config": shape, "model": {ours: weights[names[ours]] for ours in names}}


def read_shape(folder: Path) -> GPTConfig:
    """The shape in a folder's config.json. Needs no package. Raises UserError that names what is
    missing or not supported."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # in 5, in 4
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"{rope} is not supported: the rotary embedding would be scaled")
        for key, value in SUPPORTED.items():
            if config.get(key) not in (None, value):
                raise ValueError(f"{key}={config[key]!r} is not supported, only {value!r} is")
        n_head = config["num_attention_heads"]
        n_kv_head = config.get("num_key_value_heads") or n_head
        shape = GPTConfig(
            vocab_size=config["vocab_size"],
            context_length=min(config.get("max_position_embeddings", 2048), MAX_CONTEXT),
            n_layer=config["num_hidden_layers"],
            d_model=config["hidden_size"],
            head_dim=config.get("head_dim") or config["hidden_size"] // n_head,
            queries_per_kv=n_head // n_kv_head,
            n_kv_head=n_kv_head,
            d_ff=config["intermediate_size"],
            tie_embeddings=config.get("tie_word_embeddings", False),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta", 10000.0)),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        )
        if n_parameters(shape) <= 0:  # or an error, where a size is no number
            raise ValueError("its sizes are those of no model")
        return shape
    except Exception as error:  # whatever a foreign file leads to
        what = f"has no {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"{path}: {what}") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
