"""Measures how faithful scores are to retraining, ours and those of other methods."""
