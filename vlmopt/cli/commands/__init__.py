"""One file per command; each is imported when it is called, and imports the workflow inside its function."""
