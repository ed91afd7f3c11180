"""Every model that open_clip has a configuration of, shrunken, tried out with all that this software does."""
