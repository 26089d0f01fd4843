"""Inside fine-tuning: ways to make pairs, the trainer, its state, measures and model card."""
