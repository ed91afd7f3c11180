"""The demo: captioned scenes with known mistakes, and a small model trained on them."""
