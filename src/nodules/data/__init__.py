"""From a source to one table of patches: read, verified, split, transformed."""
