"""Recorded expert loads: recording, files and merging."""
