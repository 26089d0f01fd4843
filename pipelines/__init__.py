"""Text to vectors: prompted embedding with decoder-only LLMs, streamed by Ray Data."""
