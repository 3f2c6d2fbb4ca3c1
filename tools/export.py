"""A run as a Hugging Face folder: python -m tools.export OUT_DIR --to FOLDER [--no-pad]

The folder is a plain LlamaForCausalLM, which transformers and what builds on it load without our
code: config.json, model.safetensors, tokenizer.json, generation_config.json, README.md. Its layers
have one width, so narrower ones are padded with zeros, which changes no logit; --no-pad refuses.
Needs: pip install -r requirements-hf.txt
"""

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from data import DataError
from data.loader import TokenDataset
from data.tokenizer import END_OF_TEXT, load_tokenizer, tokenizer_files
from data.tokenizer_json import from_tiktoken
from model import GPTConfig
from run.checkpoint import CheckpointError, load_checkpoint, read_log
from run.config import Config, model_config
from run.llama import config_json, save_weights, weight_shapes, write_json

INPUTS = ["input_ids", "attention_mask"]  # transformers 4 would give token types, which Llama lacks

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A language model of {parameters:,} parameters in the shape of Llama, float32.

| | |
| --- | --- |
{numbers}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"  # the path of this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer("Fellow citizens", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50, do_sample=True)[0]))
```

{tokens}

{widths}
"""


def equal_widths(shape: GPTConfig) -> GPTConfig:
    """The shape that config.json can say: all layers as wide as the widest, and a number of query
    heads that divides d_model, which transformers 5 asks for. Raises CheckpointError.
    """
    counts = range(max(shape.n_kv_head), shape.d_model + 1)
    fits = [n for n in counts if shape.d_model % (n * shape.queries_per_kv) == 0]
    if not fits:
        raise CheckpointError(
            f"no number of heads from {counts[0] * shape.queries_per_kv} on divides "
            f"d_model={shape.d_model}, as transformers asks"
        )
    n = shape.n_layer
    return replace(shape, n_kv_head=[fits[0]] * n, d_ff=[max(shape.d_ff)] * n)


def pad(weights: dict[str, Tensor], wide: GPTConfig) -> dict[str, Tensor]:
    """The weights of a model of the shape `wide` with the same logits: what is new is zero.

    A neuron or head of zeros adds nothing to the residual stream, and units lie in order along
    their dim, so the new ones come last.
    """
    padded = {}
    for name, size in weight_shapes(wide).items():
        padded[name] = weights[name].new_zeros(size)
        padded[name][tuple(slice(n) for n in weights[name].shape)] = weights[name]
    return padded


def model_card(out_dir: Path, name: str, state: dict, wide: GPTConfig, n_tokens: int) -> str:
    """README.md. n_tokens: of the tokenizer; the model's vocabulary may be padded."""
    shape, log = state["model_config"], read_log(out_dir)
    log = [event for event in log if event["step"] <= state["step"]]
    numbers = {
        "parameters": f"{shape.n_parameters():,}",
        "d_ff per layer": shape.d_ff,
        "KV heads per layer": shape.n_kv_head,
        "context": f"{shape.context_length} tokens",
        "steps": f"{state['step']} of {state['config']['max_steps']}",
        "training tokens": f"{state['tokens']:,}",
        "training FLOPs": f"{state['flops']:.3g}",
        "data": Path(state["config"]["data_dir"]).name,
        "criterion": state["config"]["criterion"],
    }
    first = model_config(Config(**state["config"]), shape.vocab_size).n_parameters()
    if first > shape.n_parameters():
        numbers["parameters"] += f", pruned from {first:,}"
    else:
        del numbers["criterion"]
    for event in log:
        if event["event"] == "eval":
            bits = f"{event['val_bpb']:.4f} bits per byte"
            numbers["validation"] = f"{event['val_loss']:.4f} nats per token, {bits}"
            numbers["validation"] += f", after step {event['step']}"
    special = f"A special token that stands in a text, such as `{END_OF_TEXT}`, becomes its id; "
    special += "training had it as text. `split_special_tokens=True` gives the ids of training."
    if n_tokens < shape.vocab_size:
        special += f" Token ids from {n_tokens} on only pad the vocabulary; `generate` leaves them."
    widths = "No weight is padding."
    if wide.n_parameters() > shape.n_parameters():
        extra = wide.n_parameters() - shape.n_parameters()
        widths = (
            f"A Llama's layers have one width, so this folder pads them with zeros to d_ff "
            f"{wide.d_ff[0]} and {wide.n_kv_head[0]} KV heads: {extra:,} parameters "
            f"({extra / shape.n_parameters():.1%}) more than the model has. They change no logit "
            "but cost their memory and time."
        )
    return CARD.format(
        name=name,
        parameters=wide.n_parameters(),
        numbers="\n".join(f"| {key} | {value} |" for key, value in numbers.items()),
        tokens=special,
        widths=widths,
    )


def export(out_dir: Path, folder: Path, padding: bool = True) -> GPTConfig:
    """Write the folder, as a whole or not at all. Returns its shape.

    Raises CheckpointError or DataError, in one line: no run, no tokenizer, a folder that is there
    or cannot be written, uneven widths without padding.
    """
    if folder.exists():
        raise CheckpointError(f"{folder}: exists; give another --to")
    state = load_checkpoint(out_dir / "checkpoint.pt")
    data = TokenDataset(state["config"]["data_dir"], "val", context_length=1)
    tokenizer = load_tokenizer(data.tokenizer)
    shape = state["model_config"]
    wide = equal_widths(shape)
    if wide != shape and not padding:
        raise CheckpointError(
            f"{out_dir}: d_ff={shape.d_ff}, n_kv_head={shape.n_kv_head} would be padded to "
            f"{wide.d_ff[0]} and {wide.n_kv_head[0]}; leave --no-pad out"
        )
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        save_weights(aside, wide, pad(state["model"], wide))
        ids = dict.fromkeys(("bos", "eos", "pad"), data.end_of_text)
        ids |= getattr(tokenizer, "specials", {})  # a tokenizer from elsewhere may end otherwise
        write_json(aside / "config.json", config_json(wide, bos=ids["bos"], eos=ids["eos"]))
        generation = {f"{key}_token_id": value for key, value in ids.items()}
        if data.vocab_size < shape.vocab_size:
            generation["suppress_tokens"] = list(range(data.vocab_size, shape.vocab_size))
        write_json(aside / "generation_config.json", generation)
        own = tokenizer_files(data.tokenizer)
        if "tokenizer.json" in own:
            for name, path in own.items():
                shutil.copyfile(path, aside / name)
            if "tokenizer_config.json" in own:
                about = json.loads(own["tokenizer_config.json"].read_bytes())
                about |= {"model_max_length": shape.context_length}
                write_json(aside / "tokenizer_config.json", about)
        else:
            write_json(aside / "tokenizer.json", from_tiktoken(tokenizer))
            about = {"tokenizer_class": "PreTrainedTokenizerFast"}
            about |= {key: END_OF_TEXT for key in ("bos_token", "eos_token", "pad_token")}
            about |= {"clean_up_tokenization_spaces": False, "model_input_names": INPUTS}
            about |= {"model_max_length": shape.context_length}
            write_json(aside / "tokenizer_config.json", about)
        card = model_card(out_dir, folder.name, state, wide, data.vocab_size)
        (aside / "README.md").write_text(card, encoding="utf-8")
        aside.rename(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return wide


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out_dir", type=Path, help="a run's folder")
    parser.add_argument("--to", type=Path, required=True, help="the folder to make")
    parser.add_argument("--no-pad", action="store_true", help="refuse uneven widths")
    args = parser.parse_args(argv)
    try:
        wide = export(args.out_dir, args.to, not args.no_pad)
    except (CheckpointError, DataError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{args.to}: LlamaForCausalLM, {wide.n_parameters():,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
