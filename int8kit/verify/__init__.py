"""Verification: generated examples, the properties that must hold, and the faults that they must catch.

Packages and modules:

    examples/            strategies, fixed examples, their JSON, guarded buffers, stored regressions
    properties/          the registry of all properties, their checks, the budget, database entries and their stamps
    mutation/            seeded faults: the catalogue, mutants that rules generate, and their campaigns
    runner               one property on many examples; `verify_kernels` runs it on int8kit's kernels
    process_pool         calls in child processes that may crash or hang; `property_runs` makes findings of them
    executors            native, cross_arch, interpreter
    implementations      int8kit, other libraries, a user's function; `compare_implementations` puts them side by side
    replay               a failure, shown again by one command
"""
