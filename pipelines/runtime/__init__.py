"""What every job stands on. No numerics and no stage here; both packages import it.

``errors``      what a user is told in one line, with its exit code
``files``       paths, local or remote; files that appear whole or not at all; one retry rule
``listing``     what a path names; one glob with one meaning
``table_view``  what a file's place, in a table or a folder, says of its rows and columns
``table_folders``  which folders are tables, and paths that name a part of one
``tables``      Delta, Iceberg and Lance tables as the files of one version
``arrow``       Arrow columns of any writer as plain types; Parquet as its table has it
``column_types``  a column's type over several files, and values cast to it
``run_record``  ``run.json``: how a folder was made, and whether it is whole
``command``     a command line to one call of a job: parse, Ray, record, answer, exit code
``machines``    what the Ray cluster has and can add; where work may run; how many actors
``units``       units of work on Ray, each done once and remembered by a receipt
``threads``     work that goes on in another thread meanwhile
``segments``    Arrow files that are read a segment at a time
``logs``        log lines, as text or JSON
``packaged``    a real model and real corpora that come as Python packages
"""
