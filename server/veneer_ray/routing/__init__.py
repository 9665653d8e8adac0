"""Which replica gets a request: `veneer_server.routing` behind Serve's routers' interface."""
