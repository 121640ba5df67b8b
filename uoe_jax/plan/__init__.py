"""Layouts of a model on machines that needn't be here, and what they cost."""
