"""Lease, write, recover and publish shards."""
