"""Generate text for several requests at a time, and serve it over HTTP."""
