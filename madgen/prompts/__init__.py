"""From prompt files to shards: a pure function of the job. Knows no worker and no torch of its own."""
