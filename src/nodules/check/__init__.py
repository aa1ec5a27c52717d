"""Checks of the exercises, one module a lesson: each says why an answer is right, or raises Wrong with what is not."""
