"""Attention of one new token a row over a key/value cache, by backend."""
