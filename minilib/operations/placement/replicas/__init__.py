"""Replicas of a service on GPUs that gangs use, too: apart from each other, as many as the load needs, or in slices."""
