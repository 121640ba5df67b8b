"""Experts' MLPs: gather, up, activation times gate, down, added up."""
