"""Metrics of a training job: what ranks count, how well they use their machine, what grows in memory."""
