"""A night: what changed is embedded, upserted, clustered, checked and published.

``config``    options
``job``       the whole night, step by step
``night``     what its steps share, and which step it is at
``dry_run``   what a night would do, told before anything is written
``known_files`` keys of files that are as they were, kept in the store
``compare``   the corpus against a version, by id and text hash
``reuse``     unfinished nights, and vectors of known texts copied
``changes``   what changed, embedded
``clusters``  a candidate clustered from yesterday's centroids, under yesterday's ids
``fits``      when clusters are fitted anew, and when they are left as they were
``parts``     centroids of a fit, and the clusters that they are published as
``edits``     people's names, merges, splits and pins, applied
``titles``    names that a model writes, kept while a cluster lives
``novelty``   who fits none of the clusters, and who of them are alike
``checks``    what must hold before a version is published
``version_files``  tables, scores and report of the new version
``notify``    what became of a night, told to people and to a webhook
``own_vectors`` nights over a corpus that brings its vectors along
"""
