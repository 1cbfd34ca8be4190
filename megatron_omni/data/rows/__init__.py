"""From shards to packed training rows: lengths, the row plan, collation, the stream."""
