"""010: a published model made smaller, by method and by where the cut falls."""
