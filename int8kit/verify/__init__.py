"""Verification: what is drawn, what must hold, and which faults must be caught.

strategies · buffers    examples, and what surrounds their operands
checks · hold           the properties, and what finds and writes a counterexample
isolate                 their run in a process of its own
foreign                 another card's code here
mutants · mutate · judge    seeded faults, their run, and what a child of it does
"""
