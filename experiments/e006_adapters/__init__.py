"""Which adapter says the most per parameter? Settings of both halves."""
