"""Figures, the model card and the report pages."""
