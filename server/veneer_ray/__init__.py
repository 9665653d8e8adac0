"""Veneer on Ray Serve (``veneer-ray``, extra ``ray``): a registry, engine replicas that follow
it, and an ingress that sends each request to a replica that has its adapter.

Ray starts, watches, scales and replaces the servers, which are ordinary ``veneer-server``
processes. Calls go from the ingress (`ingress_server`, `web`) directly to them.
Only `deployments`, `ray_api`, `application` and the commands import Ray.
"""
