"""Serving on ranks that share every layer: one engine plans, all ranks compute, each with the pages of its heads."""
