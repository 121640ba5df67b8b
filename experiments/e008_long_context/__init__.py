"""008: longer T, where scores are most of the FLOPs: what do unions of heads save?"""
