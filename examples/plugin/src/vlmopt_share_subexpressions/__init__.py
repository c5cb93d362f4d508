"""The pass share-subexpressions for vlmopt."""
