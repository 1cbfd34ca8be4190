"""Samples: from collections of recordings (``sources``) over tar shards (``building``, ``shards``) to packed rows (``rows``)."""
