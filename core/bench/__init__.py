"""Benchmarks with known answers: one frame, and a suite per lever."""
