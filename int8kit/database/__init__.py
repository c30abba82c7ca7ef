"""Tuning databases: rows, lookup, files."""
