"""Which replica a request goes to: decisions only, no torch, no gRPC, no Ray.

``veneer-sim`` and a cluster's ingress use the same `AdapterRouter`; `baselines` has the usual
ways to compare it with.
"""
