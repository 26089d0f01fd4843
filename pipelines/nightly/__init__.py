"""A night: what changed, embedded, upserted, clustered, checked and published."""
