"""Norm, scores, picks and gates of one token a row, by backend."""
