"""The inputs of the properties: strategies, fixed examples, guarded buffers, stored regressions."""
