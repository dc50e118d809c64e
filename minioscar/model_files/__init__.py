"""What the files of a model folder say, in the spellings of all families and years."""
