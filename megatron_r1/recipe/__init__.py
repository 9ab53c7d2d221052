"""The stages of a recipe as a resumable graph with lineage."""
