"""Models that unions are compared with, each in one file."""
