"""005: `small` trained dense, cut into a union, trained on with half of its experts."""
