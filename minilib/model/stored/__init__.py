"""A checkpoint as it is stored: its files, which tensors a parameter is made of, and which copy of one counts."""
