"""Files and tables to documents: what a corpus is made of, and its rows one by one.

``files``         which files there are, their columns, and how each is cut into shards
``readers``       a shard to rows, one problem a row
``documents``     rows to documents, accepted or rejected with a reason
``kept_columns``  columns carried from corpus to output, whatever the formats
``sample``        documents drawn from a corpus, whatever its order
"""
