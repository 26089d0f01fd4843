"""Files and tables to documents: what a corpus is made of, and its rows one by one."""
