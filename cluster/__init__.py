"""Vectors to groups: k-means, scores, keywords and a report that a person can read.

``config``        options of its jobs, and those that a night shares
``clustering``    the whole run
``work``          what a stopped run has done, so that the same command goes on
``vectors``       vectors on disk as blocks of checked arrays
``vector_files``  files of vectors, format by format
``vector_columns``  columns of vectors, whoever wrote them, as lists of numbers
``line_files``    JSON lines, CSV and TSV of vectors
``matrix_files``  NumPy, fvecs, fbin and FAISS indexes
``sample``        one pass that checks, counts and draws a sample
``distances``     lengths and differences in float64
``kmeans``        centroids of vectors in memory
``hierarchy``     levels that nest, and merges of clusters
``lloyd``         centroids of vectors on disk, by many workers
``on_ray``        those workers
``assign``        the nearest centroid, exactly
``census``        a shard assigned to a file, and what scores need added up
``noise``         documents that belong to no dense region
``known``         a finished clustering, for new vectors
``newcomers``     new vectors given to it, and what fits nowhere
``num_clusters``  choosing k
``metrics``       scores with labels and without
``identity``      which new cluster is which old one
``comparison``    two clusterings of the same documents
``drift``         how far a clustering has moved
``describe``      keywords and documents that stand for a cluster
``duplicates``    which vectors are near-duplicates, exactly, and the rule of who is kept
``duplicate_search``  ranks, rounds and decisions of a search for them over Ray
``vector_duplicates``  that search among vectors, none missed
``text_duplicates``  that search by wording, each pair verified
``deduplication``  the job that cleans a whole corpus
``clean``         the rows that it keeps, with all their columns
``duplicate_report``  its page
``document_map``  every document on a plane
``kept_columns``  what kept columns say of the clusters, and topics over time
``roll_up``       passages back to documents
``outcome``       everything that a clustering says of its levels
``tables``        the same as tables
``report``        one HTML page
``report_data``   what the page shows, as JSON of bounded size
``report_columns``  the part of it about kept columns
``page_text``     texts as a page holds them, escaped and cut
"""
