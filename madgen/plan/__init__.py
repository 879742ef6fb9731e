"""From prompt files to shards: a pure function of the job. Plain Python, knows no worker."""
