"""Composition of the nodes into sim, hardware, stream and replay; deqmpc fly; launch files and configuration."""
