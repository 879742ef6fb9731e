"""A job before it runs: what it resolves to, what it costs and how long it takes. Loads no weights."""
