"""Models with an image and a text tower, their features, scopes and checkpoints."""
