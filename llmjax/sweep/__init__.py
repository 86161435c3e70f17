"""Sweeps over config fields: ranges, trials as processes, a study that several processes share, and its page."""
