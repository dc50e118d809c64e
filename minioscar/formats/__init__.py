"""Weights in 4 and 8 bits, as files keep them: a small reader for each format, from a file's tensors to `plain.Plain`."""
