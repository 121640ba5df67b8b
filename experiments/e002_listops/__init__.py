"""002: ListOps of the Long Range Arena, sequences of up to 2,000 tokens."""
