"""From a source to shards: decode, check, encode, write; on one machine or many."""
