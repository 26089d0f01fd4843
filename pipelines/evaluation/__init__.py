"""Which encoder: chosen on a corpus, scored by mteb, looked into."""
