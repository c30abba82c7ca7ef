"""The inputs of the properties: strategies, fixed examples, their JSON, guarded buffers, stored regressions."""
