"""A baseline for the loss: a model that knows only which token follows which."""

import numpy as np

from data.loader import TokenDataset


def bigram_loss(train: TokenDataset, val: TokenDataset, max_tokens: int) -> float | None:
    """Nats per token on the first `max_tokens` of `val`, after counting the pairs in `train`.

    p(y|x) = (count(x, y) + k(x) p(y)) / (count(x) + k(x)), where k(x) is one more than the number
    of different tokens seen after x, and p(y) comes from add-one counts: Witten and Bell (1991).

    None if the table would have more than 1e8 entries.
    """
    V = train.vocab_size
    if V**2 > 1e8:
        return None
    rows = max(1, 2**20 // train.context_length)
    count = np.zeros((V, V), np.uint32)
    for x, y in train.in_order(rows):
        np.add.at(count.reshape(-1), (x * V + y).flatten().numpy(), np.uint32(1))
    total, k = count.sum(axis=1), np.count_nonzero(count, axis=1) + 1
    unigram = count.sum(axis=0) + 1
    unigram = unigram / unigram.sum()
    nats = pairs = 0
    for x, y in val.in_order(rows, max_tokens):
        x, y = x.numpy(), y.numpy()
        nats -= np.log((count[x, y] + k[x] * unigram[y]) / (total[x] + k[x])).sum()
        pairs += x.size
    return float(nats / pairs)
