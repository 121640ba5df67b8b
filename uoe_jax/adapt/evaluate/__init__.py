"""Functions of parameters, traced and evaluated with adapters they know nothing of."""
