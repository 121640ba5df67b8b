"""Softmax attention inside the segments of packed rows, by backend."""
