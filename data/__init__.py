"""Text to tokens to batches: a corpus that ships with the project, and your own text."""
