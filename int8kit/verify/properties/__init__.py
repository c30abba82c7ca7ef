"""Properties that a kernel must have."""
