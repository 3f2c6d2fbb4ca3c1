"""The loss of a trained model on a text; and what a trained model is loaded from."""

import math
import shutil

import pytest
import torch
from helpers import refused
from test_model import large

from data.tokenizer import encode_bytes, load_tokenizer
from model import GPT, GPTConfig
from tools import evaluate, sample
from tools.load import Trained

SHAPE = GPTConfig(
    vocab_size=1024, context_length=16, n_layer=2, d_model=16, head_dim=8, queries_per_kv=1,
    n_kv_head=2, d_ff=24,
)  # fmt: skip


@pytest.mark.parametrize("times", [1, 8, 17], ids="{} times".format)
def test_each_byte_of_a_text_is_predicted_once(times):
    """Also where the text is shorter than a window, or ends where a window does."""
    tokenizer, model = load_tokenizer("shipped"), large(GPT(SHAPE)).eval()
    trained = Trained(model, tokenizer, "shipped", 1024, tokenizer.eot_token, {})
    text = b"The sum of \xff\xfe is \xf0\x9f\x99\x82." * times
    tokens = [trained.end_of_text, *encode_bytes(tokenizer, text)]
    n, nats = len(tokens) - 1, 0.0
    for t in range(1, n + 1):  # each token alone; the last window is full, too
        start = min((t - 1) // 16 * 16, max(0, n - 16))
        logits = model(torch.tensor([tokens[start:t]])).detach()
        p = torch.softmax(logits[0, -1].double(), -1)
        nats -= math.log(p[tokens[t]])
    got = evaluate.judge_text(trained, text)
    assert got["bits per byte"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)
    assert got["perplexity per token"] == pytest.approx(math.exp(nats / n), rel=1e-4)


def test_a_run_is_read_without_its_log_but_not_with_other_data(undisturbed, tmp_path, capsys):
    for name in ("config.json", "checkpoint.pt"):
        shutil.copy(undisturbed / name, tmp_path)
    assert sample.main([str(tmp_path), "--tokens=1"]) == 0
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save(state | {"data": "of another text"}, tmp_path / "checkpoint.pt")
    refused(capsys, sample.main, tmp_path, words=f"{tmp_path}: .*other data than .*toy")
