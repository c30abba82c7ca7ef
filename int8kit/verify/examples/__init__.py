"""Generated inputs: strategies, guarded buffers, stored regressions."""
