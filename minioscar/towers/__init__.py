"""Pictures and sound on their way into the model: a tower turns each into embeddings, which stand among those of the
text."""
