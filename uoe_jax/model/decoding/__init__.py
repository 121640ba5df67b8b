"""A decoder's weights laid out once for decoding, and the step that uses them."""
