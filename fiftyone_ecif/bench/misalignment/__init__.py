"""Detectors of misaligned pairs against each other, on pairs whose captions were permuted."""
