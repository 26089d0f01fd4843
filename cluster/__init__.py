"""Vectors to groups: k-means, scores, keywords and a report a person can read."""
