"""What is expensive to compute, kept on disk. Knows neither FiftyOne nor any model."""
