"""What lies on a disk: finding and fetching a model, reading what a user names, writing a file whole or not at all."""
