"""Metrics: is a map faithful to the model, and does it lie where the object is?

Plain functions of arrays. A map is (H, W) in the size of what it is compared with, a truth is a mask (H, W).
"""
