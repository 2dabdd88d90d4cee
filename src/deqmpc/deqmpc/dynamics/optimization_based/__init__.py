"""Discrete dynamics that are the solution of a cone program or of contact conditions."""
