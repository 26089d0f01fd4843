"""Corpus to pairs, pairs to adapter, on Ray Train: contrastive LoRA fine-tuning.

``pairs``       a corpus to pairs of texts that mean the same
``rewriting``   paraphrases and back-translations by a model
``pair_files``  pairs as files, ours or anyone's
``config``      options of fine-tuning and of pairs
``job``         pairs to adapter: the whole run
``batches``     which pairs in which step
``on_ray``      workers, restarts, checkpoints
``loop``        step, measure, keep the best; what a run must remember to go on
``trainer``     one rank: a step, measures on held-out pairs
``loss``        the contrastive loss over all ranks, in little memory
``adapter``     a LoRA adapter on a base model, also in eight or four bits
``lean``        backward passes by hand where training spends its time
``result``      the adapter's folder: history, picture, model card
"""
