"""`vlmopt plan`: from profiles to a cut, in seconds and without the model. Nothing here imports torch."""
