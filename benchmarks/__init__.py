"""Measurements of this project against its peers; nothing here is part of a pipeline run."""
