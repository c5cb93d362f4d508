"""The nouns of the compiler. Nothing here imports torch, so the command line starts at once."""
