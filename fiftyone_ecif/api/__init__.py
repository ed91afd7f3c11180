"""The public functions, shaped like FiftyOne Brain's: samples in, fields and a run out."""
