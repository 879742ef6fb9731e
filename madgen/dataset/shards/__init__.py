"""Work on unfinished shards: leases, journals, recovery and publishing."""
