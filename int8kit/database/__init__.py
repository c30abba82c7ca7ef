"""Tuning databases: which tile configuration was tuned and verified for which GEMM shape on which GPU.

Modules:

    schema.py    the file format: one JSON file per GPU, one entry per line
    database.py  a database in memory: merge, verification stamps, lookup
    store.py     database files: reading, writing under a lock, the search path
    upgrade.py   conversion of files of earlier formats
    problems.py  reasons not to trust a database, for `int8kit db check`
"""
