"""Recorder, bag replay, trial protocol, evaluation and report."""
