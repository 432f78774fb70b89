"""A cluster as data: topology.py what stands where, capacity.py whose each GPU is, drawing.py what a figure shows."""
