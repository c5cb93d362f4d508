"""First-party passes, registered through the same entry points as anybody else's."""
