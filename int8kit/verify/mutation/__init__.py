"""Seeded faults that the verifier must catch."""
