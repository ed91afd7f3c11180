"""The mathematics: losses, removal roles, curvature, scores. Tensors in, tensors out."""
