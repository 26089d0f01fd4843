"""Corpus to vectors on Ray Data: every text once, every row accounted for.

``job``       options and the whole run
``plan``      what an unfinished run has settled
``keys``      repeated ids and texts, with no list of all of them
``encode``    texts to vectors by tokenizer tasks and encoder actors, and how far it is
``write``     documents with their vectors in files of even size
``estimate``  what a run would do and how long it would take
``sizing``    documents to hours, machines and money
"""
