"""Models of other libraries read as runs, and runs written as theirs.

Hugging Face folders of safetensors, and GGUF files. No pickle is read, no code of a
file is run, nothing is fetched unless a hub is named.
"""
