"""Seconds and memory against embeddings, forward passes, hooks and the disk."""
