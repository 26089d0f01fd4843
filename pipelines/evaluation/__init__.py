"""Which encoder: chosen on a corpus, scored by mteb, looked into.

``config``       options of the three jobs
``select``       prompts, poolings and layers tried on a sample
``trial``        one prompt: every layer and pooling of one pass, clustered
``ranking``      candidates ranked, and how surely
``evaluate``     encoders scored by mteb over the Ray cluster
``mteb``         encoders as mteb wants them
``contestants``  what is compared, named in one word
``tasks``        tasks by name, labelled corpora as tasks, one encoder on one task
``leaderboard``  means, spreads, paired bootstrap; scores of finished runs
``attention``    what the last token attends to, before and after tuning
``token_kinds``  prompt, content word, function word, and what each gets
``figure``       the picture
"""
