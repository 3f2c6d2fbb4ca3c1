"""Text to tokens to batches: the shipped corpus, and your own text."""
