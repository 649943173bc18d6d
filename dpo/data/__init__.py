"""Preference data: readers, formats, the schema and the validation."""
