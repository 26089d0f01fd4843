"""Corpus to pairs, pairs to adapter, on Ray Train: contrastive LoRA fine-tuning."""
