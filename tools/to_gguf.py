"""A model as a GGUF file, for llama.cpp, ollama and LM Studio: tools.export --to FILE.gguf

The architecture is `llama`, the weights stay in float32. Rows of the embeddings that only pad the
vocabulary are left out, so that no program can say them.
"""

from contextlib import closing
from pathlib import Path

import tiktoken

from data.tokenizer import CHARACTER, END_OF_TEXT, FolderTokenizer
from run import UserError
from run.hugging_face import weight_names
from tools.load import Trained


def spell_merges(encoding: tiktoken.Encoding) -> tuple[list[str], list[tuple[str, str]]]:
    """All tokens but <|endoftext|>, in printable characters, and their merges.

    tiktoken merges the pair that makes the token of the lowest rank. So each pair that makes a
    token is a merge here, in the order of the ranks.
    """
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    spelled = {token: "".join(CHARACTER[byte] for byte in token) for token in tokens}
    merges = []
    for token in tokens:
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        merges += [(spelled[a], spelled[b]) for a, b in halves if a in spelled and b in spelled]
    return list(spelled.values()), merges


def write_gguf(trained: Trained, path: Path) -> None:
    """Raises UserError: no package gguf, or a tokenizer that is not one of tiktoken's."""
    try:
        import gguf
    except ImportError:
        raise UserError("no package gguf: pip install -r requirements-extra.txt") from None
    if isinstance(trained.tokenizer, FolderTokenizer):
        way = "export a folder, and give it to llama.cpp's convert_hf_to_gguf.py"
        raise UserError(f"the model has a Hugging Face tokenizer; {way}")
    shape, end = trained.model.config, trained.end_of_text
    with closing(gguf.GGUFWriter(path, "llama")) as file:
        file.add_file_type(gguf.LlamaFileType.ALL_F32)
        file.add_vocab_size(trained.vocab_size)
        file.add_context_length(shape.context_length)
        file.add_embedding_length(shape.d_model)
        file.add_block_count(shape.n_layer)
        file.add_feed_forward_length(shape.d_ff)
        file.add_head_count(shape.n_head)
        file.add_head_count_kv(shape.n_kv_head)
        file.add_key_length(shape.head_dim)
        file.add_value_length(shape.head_dim)
        file.add_rope_dimension_count(shape.head_dim)
        file.add_rope_freq_base(shape.rope_theta)
        file.add_layer_norm_rms_eps(shape.norm_eps)

        tokens, merges = spell_merges(trained.tokenizer)
        file.add_tokenizer_model("gpt2")  # byte pairs, whatever the vocabulary
        # How a text is cut before the merges: PATTERN of data/tokenizer.py is Llama 3's, too
        file.add_tokenizer_pre("gpt-2" if trained.tokenizer_name == "gpt2" else "llama-bpe")
        file.add_token_list([*tokens, END_OF_TEXT])
        file.add_token_types([gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL])
        file.add_token_merges([f"{a} {b}" for a, b in merges])
        file.add_bos_token_id(end)
        file.add_eos_token_id(end)
        file.add_add_bos_token(False)  # llama.cpp would put one before a text, and we do not

        weights = trained.model.state_dict()
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.n_layer)
        for ours, theirs in weight_names(shape).items():
            if ours == "unembed.weight" and shape.tie_embeddings:
                continue  # it is embed.weight
            weight = weights[ours].float().cpu()
            if ours in ("embed.weight", "unembed.weight"):
                weight = weight[: trained.vocab_size]
            if ours.endswith((".q.weight", ".k.weight")):
                # llama.cpp rotates rows 2i and 2i + 1 of a head, model.py i and i + head_dim / 2
                halves = weight.unflatten(0, (-1, 2, shape.head_dim // 2))
                weight = halves.transpose(1, 2).reshape(weight.shape)
            file.add_tensor(names.get_name(theirs, (".weight",)), weight.numpy())
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
