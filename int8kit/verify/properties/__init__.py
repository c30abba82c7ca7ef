"""The properties that every kernel must have: one table, `registry`, and the checks behind it."""
