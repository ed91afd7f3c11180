"""Detectors of captions that do not belong to their image. Arrays in, scores out."""
