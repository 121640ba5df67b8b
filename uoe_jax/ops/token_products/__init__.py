"""Products of one token a row with the experts it picked, by backend."""
