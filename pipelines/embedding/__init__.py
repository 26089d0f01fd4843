"""Corpus to vectors on Ray Data: every text once, every row accounted for.

``config``    options
``job``       the whole run
``plan``      what an unfinished run has settled
``keys``      the first read: repeated ids and texts by their digests, with no list of all of them
``chunks``    the second read: documents that are to be encoded, in chunks of about equal work
``encode``    chunks to vectors: in this process, or by tasks that read and encoder actors
``progress``  how far that is
``write``     rows with their vectors, a file a chunk and then in files of even size
``estimate``  what a run would do and how long it would take
``sizing``    documents to hours, machines and money
"""
