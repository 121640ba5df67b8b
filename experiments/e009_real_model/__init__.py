"""009: a published model cut into experts, healed, and compared with plainer ones."""
