"""Attention of whole sequences or of the documents in them, by backend."""
