"""Vertex AI: the batch and the online backend, and what they share."""
