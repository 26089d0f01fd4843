"""Inside the embedding job: read, check, find repeats, encode in chunks, write files."""
