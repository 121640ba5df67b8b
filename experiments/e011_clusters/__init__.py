"""Experiment 011: clusters of pictures, with MLC's network and without."""
