"""Models made smaller by what their layers compute on a text; one pass for all."""
