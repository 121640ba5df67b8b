"""Experiment 012: what evidence says at equal seconds, on clean text, by size."""
