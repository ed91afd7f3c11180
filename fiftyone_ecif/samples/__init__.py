"""FiftyOne samples as image-caption pairs, and what is done to them by their scores."""
