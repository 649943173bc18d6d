"""Preference data: sources, formats and the contract."""
