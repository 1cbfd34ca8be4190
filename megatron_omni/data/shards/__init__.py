"""Shard format v1 on disk: writing, reading, checking and looking at it."""
