"""The mathematics on numpy and torch arrays: no Ray, no paths, no settings objects."""
