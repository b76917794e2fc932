"""Checkpoints of Hugging Face as P and Q."""
