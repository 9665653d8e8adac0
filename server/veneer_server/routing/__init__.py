"""Chooses the replica for each request: decisions only, no torch, no gRPC, no Ray.

``veneer-sim`` and a cluster's ingress use the same `AdapterRouter`; `baselines` has the usual
routers for comparison.
"""
