"""007: what of 001 shows on two CPU cores: small models, built-in text."""
