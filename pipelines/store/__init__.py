"""Versions of embedded and clustered documents: publish, roll back, verify, search.

``config``     what a person may ask of a store
``store``      the versions, the published one, what to keep and remove
``version``    a sealed version, for readers, and its search
``candidate``  a version in the making
``documents``  how Lance keeps the rows of all versions
``columns``    columns of a document, and rows made of what comes
``records``    ``version.json`` and publications: what belongs to what, and when
``index``      the index of vectors with its measured recall, that of words, rankings joined
``edits``      what people decide about clusters, for nights to apply
``compare``    two versions side by side
``backfill``   vectors of another encoder that gather over several nights
``lease``      one writer at a time
``verify``     every invariant of a store
``manage``     the verbs of ``manage_store.py``, export among them
``search``     a text or a document to the nearest documents
"""
