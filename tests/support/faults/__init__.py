"""Fault injection on a project with a tiny model.

Each fault is one function. It injects the fault once and asserts that the project recovers: all results equal
those of an uninterrupted run byte for byte, and no partial file is used. `test_faults.py` runs the quick faults
once, `make faults` runs all of them several times.
"""
