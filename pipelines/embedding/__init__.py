"""Corpus to vectors on Ray Data: keys, encoder actors, files of even size."""
