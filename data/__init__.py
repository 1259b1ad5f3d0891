"""Data: sources, tokenizers, objectives, tasks, converters and the stream of batches. Never imports jax."""
