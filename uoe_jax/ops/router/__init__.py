"""Scores of a router of tokens, the experts picked by them, and sums for statistics."""
