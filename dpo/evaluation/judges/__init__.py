"""Judges, which compare two responses to a prompt."""
