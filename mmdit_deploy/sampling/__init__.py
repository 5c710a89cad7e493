"""Rectified flow: schedules, and the Euler sampler with guidance."""
