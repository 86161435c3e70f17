"""A run on disk and in memory: config, workdir, train state, loading."""
