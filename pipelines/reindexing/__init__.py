"""Inside a night: what changed, its vectors, warm clusters, checks."""
