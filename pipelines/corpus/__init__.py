"""Files and tables to documents: what a corpus is made of, and its rows one by one.

``files``             which files there are, how they are to be read, and their cuts into shards
``streams``           bytes of text files: uncompressed, as UTF-8, line by line
``dialects``          CSV and TSV: which dialect a file is in
``delimited``         their rows one by one, in each dialect
``delimited_blocks``  and block by block where that gives the same
``columnar``          Parquet, Arrow and Lance: columns, shards, rows
``web_archives``      WET files of Common Crawl
``readers``           what a file holds; a shard to rows, one problem a row
``documents``         rows to documents, accepted or rejected with a reason
``passages``          where long texts are cut, and a row a passage
``given_vectors``     vectors that a corpus brings along in a column
``detected``          what was detected of a corpus, for people
``kept_columns``      columns carried from corpus to output, whatever the formats
``sample``            documents drawn from a corpus, whatever its order
"""
