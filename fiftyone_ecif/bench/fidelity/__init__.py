"""Predicted effects of removing pairs against real retraining."""
