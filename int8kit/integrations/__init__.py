"""Int8kit inside other libraries."""
