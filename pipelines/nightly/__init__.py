"""A night: what changed is embedded, upserted, clustered, checked and published.

``config``    options
``job``       the whole night, step by step
``compare``   the corpus against a version, by id and text hash
``reuse``     unfinished nights, and vectors of known texts copied
``changes``   what changed, embedded
``clusters``  a candidate clustered from yesterday's centroids, under yesterday's ids
``checks``    what must hold before a version is published
"""
