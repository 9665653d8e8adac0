"""Chooses the replica of a request: `veneer_server.routing` behind Ray Serve's interface."""
