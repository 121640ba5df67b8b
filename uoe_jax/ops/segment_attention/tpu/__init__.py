"""Segment attention on TPUs."""
