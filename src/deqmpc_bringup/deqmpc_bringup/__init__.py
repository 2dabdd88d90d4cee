"""Composition of the nodes into flights: deqmpc fly, launch files, configuration."""
